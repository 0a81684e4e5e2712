// Which weights train is said in one way: while a threshold or a count is set, the other ways are off, and
// so is what goes by size where the gradient says it.

import { app } from "../../scripts/app.js";
import { followWidget } from "./sara_chart.js";

const WAYS = ["threshold", "count", "fraction"]; // the first one that is set counts
const isSet = (widget, node) =>
  node.inputs?.some((input) => input.name === widget.name && input.link != null) ||
  (widget.type === "number" ? widget.value > 0 : String(widget.value ?? "").trim() !== "");

const named = (node, name) => node.widgets?.find((one) => one.name === name);

export function update(node) {
  let isDecided = false;
  for (const name of WAYS) {
    const widget = named(node, name);
    if (!widget) continue;
    widget.disabled = isDecided;
    isDecided ||= isSet(widget, node);
  }
  const from = named(node, "select_from"); // of which the fraction is
  if (from) from.disabled = named(node, "fraction")?.disabled;
  const by = named(node, "select_by");
  if (by) {
    by.disabled = isSet(named(node, "threshold"), node);
    const isBySize = by.disabled || by.value !== "gradient";
    for (const name of ["zeros", "progressive"]) named(node, name).disabled = !isBySize;
    for (const name of ["threshold", "select_from"]) named(node, name).disabled ||= !isBySize;
  }
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
    const followed = [...WAYS, "select_by"];
    for (const widget of (node.widgets ?? []).filter((one) => followed.includes(one.name)))
      followWidget(node, widget, () => update(node));
  },
});
