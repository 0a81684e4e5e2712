// Folds the widgets away that few runs need, behind a button, where the frontend does not do it by
// itself: newer ones do in Vue nodes, and have a setting for it.

import { app } from "../../scripts/app.js";
import { text } from "./sara_text.js";

const PROPERTY = "sara_all_settings"; // whether they are shown; kept with the workflow
const NATIVE = "Comfy.Node.AlwaysShowAdvancedWidgets", VUE = "Comfy.VueNodes.Enabled";
const isNative = () =>
  LiteGraph.vueNodesMode && app.extensionManager?.setting?.settings?.[NATIVE] !== undefined;
const isAdvanced = (widget) => Boolean(widget.options?.advanced);
const isLinked = (node, widget) =>
  node.inputs?.some((input) => input.name === widget.name && input.link != null);
const noRoom = () => [0, -4]; // the gap to the next one is 4

function takeRoom(widget, does) {
  if (does) delete widget.computeSize;
  else widget.computeSize = noRoom;
}

// Shows what is to be seen; the frontend's own way hides widgets itself, but leaves their room.
function apply(node, button) {
  const isOpen = Boolean(node.properties[PROPERTY]), native = isNative();
  for (const widget of node.widgets.filter(isAdvanced)) {
    const isShown = native || isOpen || isLinked(node, widget);
    widget.hidden = widget.options.hidden = !isShown;
    takeRoom(widget, !native && isShown);
  }
  button.hidden = button.options.hidden = native;
  takeRoom(button, !native);
  button.label = button.name = isOpen ? text("fewer_settings") : text("all_settings");
  node.widgets = [...node.widgets]; // has Vue nodes look at them again
  node.graph?.setDirtyCanvas?.(true, true);
}

// Shows it, and makes the node as much taller or lower as that takes.
function refold(node, button) {
  const [, before] = node.computeSize();
  apply(node, button);
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(height, node.size[1] + height - before)]);
}

function everyNode(graph, does) {
  for (const node of graph?.nodes ?? []) {
    does(node);
    if (node.subgraph) everyNode(node.subgraph, does);
  }
}

const refolds = new WeakMap(); // node -> what folds it anew

app.registerExtension({
  name: "SaRA.Advanced",
  async setup() {
    app.ui?.settings?.addEventListener?.(`${VUE}.change`, () =>
      setTimeout(() => everyNode(app.rootGraph ?? app.graph, (node) => refolds.get(node)?.())));
  },
  nodeCreated(node) {
    const folded = (node.widgets ?? []).filter(isAdvanced);
    if (!node.comfyClass?.startsWith("Sara") || !folded.length) return;
    const button = node.addWidget("button", text("all_settings"), null, () => {
      node.properties[PROPERTY] = !node.properties[PROPERTY];
      refold(node, button);
    });
    button.serialize = false;
    button.options.serialize = false;
    refolds.set(node, () => refold(node, button));
    const configure = node.configure, configured = node.onConfigure, connected = node.onConnectionsChange;
    let isConfigured = true; // while it is not, its size is that of what is not yet there
    node.configure = function () {
      isConfigured = false;
      try {
        return configure.apply(this, arguments);
      } finally {
        isConfigured = true;
      }
    };
    node.onConfigure = function () {
      const result = configured?.apply(this, arguments);
      apply(node, button);
      const [width, height] = node.computeSize();
      if (node.size[0] < width || node.size[1] < height)
        node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
      return result;
    };
    node.onConnectionsChange = function () {
      const result = connected?.apply(this, arguments);
      if (node.graph && isConfigured) refold(node, button);
      return result;
    };
    refold(node, button);
  },
});
