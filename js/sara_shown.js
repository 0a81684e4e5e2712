// What the server tells nodes to show, by workflow and execution id, for pages opened later too.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { nodeOf } from "./sara_chart.js";

const key = (state) => `${state.workflow}/${state.node}`;

const queued = new Map(), MOST = 100; // prompt id -> the workflow it was queued from on this page

app.registerExtension({
  name: "SaRA.Shown",
  async setup() {
    const queue = api.queuePrompt;
    api.queuePrompt = async function (number, prompt) {
      const answer = await queue.apply(this, arguments);
      if (answer?.prompt_id) queued.set(answer.prompt_id, prompt?.workflow?.id);
      if (queued.size > MOST) queued.delete(queued.keys().next().value);
      return answer;
    };
  },
});

// Whether a state of the same run says less than one that is known, as an answer that took its time may.
function isOlder(state, than) {
  return Boolean(than) && state.started != null && state.started === than.started && state.step < than.step;
}

// Follows what nodes have put out as `kind`; `show(node, state)` is called for nodes of the open
// workflow. Returns `receive`, for states that come another way, and `again`, for a graph made anew.
export function follow(kind, show) {
  const states = new Map();

  function receive(state) {
    if (isOlder(state, states.get(key(state)))) return;
    states.set(key(state), state);
    const graph = app.rootGraph ?? app.graph;
    if (state.workflow !== graph?.id) return; // of another tab, or queued by a script
    const node = nodeOf(graph, state.node);
    if (node) show(node, state);
  }

  async function load() {
    try {
      const shown = (await (await api.fetchApi("/sara/shown")).json())[kind] ?? [];
      shown.forEach(receive);
      const listed = new Set(shown.map(key));
      for (const state of states.values()) // of a server that has been started anew
        if (state.status === "training" && !listed.has(key(state)))
          receive({ ...state, status: "stopped" });
    } catch (error) {
      console.warn(`SaRA: earlier charts (${kind}) are not shown`, error);
    }
  }

  function again() {
    for (const state of states.values()) receive(state);
  }

  api.addEventListener("executed", ({ detail }) => {
    // An output from the cache may have been made by a node of another id, in another workflow.
    const asked = queued.get(detail.prompt_id), open = (app.rootGraph ?? app.graph)?.id;
    for (const state of detail.output?.[kind] ?? []) {
      const isOwn = state.node === detail.node && state.workflow && (asked ?? state.workflow) === state.workflow;
      receive(isOwn ? state : { ...state, node: detail.node, workflow: asked ?? open });
    }
  });
  api.addEventListener("reconnected", load);
  return { receive, load, again };
}
