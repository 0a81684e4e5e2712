// Folds the widgets away that few runs need, behind a button, where the frontend does not do it by
// itself: newer ones do in Vue nodes, and have a setting for it.

import { app } from "../../scripts/app.js";
import { text } from "./sara_text.js";

const PROPERTY = "sara_all_settings"; // whether they are shown; kept with the workflow
const NATIVE = "Comfy.Node.AlwaysShowAdvancedWidgets";
const isNative = () =>
  LiteGraph.vueNodesMode && app.extensionManager?.setting?.settings?.[NATIVE] !== undefined;
const isAdvanced = (widget) => Boolean(widget.options?.advanced);

function takeNoRoom(widget) {
  widget.computeSize = () => [0, -4]; // the gap to the next one is 4
}

function fold(node, button) {
  const isOpen = Boolean(node.properties[PROPERTY]);
  for (const widget of node.widgets.filter(isAdvanced)) {
    widget.hidden = widget.options.hidden = !isOpen;
    if (isOpen) delete widget.computeSize;
    else takeNoRoom(widget);
  }
  button.label = button.name = isOpen ? text("fewer_settings") : text("all_settings");
  node.widgets = [...node.widgets]; // has Vue nodes look at them again
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), height]);
  node.graph?.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "SaRA.Advanced",
  nodeCreated(node) {
    const folded = (node.widgets ?? []).filter(isAdvanced);
    if (!node.comfyClass?.startsWith("Sara") || !folded.length) return;
    if (isNative()) {
      folded.forEach(takeNoRoom); // else the node stays as tall as with all of them
      return;
    }
    const button = node.addWidget("button", text("all_settings"), null, () => {
      node.properties[PROPERTY] = !node.properties[PROPERTY];
      fold(node, button);
    });
    button.serialize = false;
    button.options.serialize = false;
    const configured = node.onConfigure;
    node.onConfigure = function () {
      const result = configured?.apply(this, arguments);
      fold(node, button);
      return result;
    };
    fold(node, button);
  },
});
