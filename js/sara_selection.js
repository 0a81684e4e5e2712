// Which weights train is said in one way: while a threshold or a count is set, the other ways are off.

import { app } from "../../scripts/app.js";
import { followWidget } from "./sara_chart.js";

const WAYS = ["threshold", "count", "fraction"]; // the first one that is set counts
const isSet = (widget, node) =>
  node.inputs?.some((input) => input.name === widget.name && input.link != null) ||
  (widget.type === "number" ? widget.value > 0 : String(widget.value ?? "").trim() !== "");

export function update(node) {
  let isDecided = false;
  for (const name of WAYS) {
    const widget = node.widgets?.find((one) => one.name === name);
    if (!widget) continue;
    widget.disabled = isDecided;
    isDecided ||= isSet(widget, node);
  }
  const from = node.widgets?.find((one) => one.name === "select_from"); // of which the fraction is
  if (from) from.disabled = node.widgets.find((one) => one.name === "fraction")?.disabled;
  node.graph?.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "SaRA.Selection",
  nodeCreated(node) {
    if (!["SaraTrain", "SaraAnalyze"].includes(node.comfyClass)) return;
    const connected = node.onConnectionsChange;
    node.onConnectionsChange = function () {
      const result = connected?.apply(this, arguments);
      update(node);
      return result;
    };
    for (const widget of (node.widgets ?? []).filter((one) => WAYS.includes(one.name)))
      followWidget(node, widget, () => update(node));
  },
});
