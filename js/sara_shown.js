// What the server tells nodes to show, by workflow and execution id, for pages opened later too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeOf } from "./sara_chart.js";

const key = (state) => `${state.workflow}/${state.node}`;

// Follows what nodes have put out as `kind`; `show(node, state)` is called for nodes of the open
// workflow. Returns `receive`, for states that come another way, and `again`, for a graph made anew.
export function follow(kind, show) {
  const states = new Map();

  function receive(state) {
    states.set(key(state), state);
    const graph = app.rootGraph ?? app.graph;
    if (state.workflow !== graph?.id) return; // of another tab, or queued by a script
    const node = nodeOf(graph, state.node);
    if (node) show(node, state);
  }

  async function load() {
    try {
      const shown = await (await api.fetchApi("/sara/shown")).json();
      for (const state of shown[kind] ?? []) receive(state);
    } catch (error) {
      console.warn(`SaRA: earlier charts (${kind}) are not shown`, error);
    }
  }

  function again() {
    for (const state of states.values()) receive(state);
  }

  api.addEventListener("executed", ({ detail }) => {
    // An output from the cache may have been made by a node of another id, in another workflow.
    const workflow = (app.rootGraph ?? app.graph)?.id;
    for (const state of detail.output?.[kind] ?? [])
      receive(state.node === detail.node && state.workflow ? state
        : { ...state, node: detail.node, workflow });
  });
  api.addEventListener("reconnected", load);
  return { receive, load, again };
}
