// Workflows keep the values of widgets by position. Ours say the names beside them, so that a later
// version may order its widgets anew; those from before that are known by the order they had then.

import { app } from "../../scripts/app.js";

const NAMES = "sara_widgets";
const BEFORE = { // up to 0.1
  SaraTrain: [
    "threshold", "fraction", "steps", "batch_size", "grad_accumulation_steps", "learning_rate",
    "lr_schedule", "warmup_steps", "progressive", "low_rank_weight", "max_grad_norm",
    "loss_function", "caption_dropout", "weight_decay", "seed", "gradient_checkpointing",
    "training_dtype", "save_dtype", "output_name", "save_every_steps", "keep_checkpoints", "resume",
    "include", "exclude", "zeros", "regularisation_weight", "validation_split",
    "validate_every_steps", "preview_every_steps", "preview_strength", "trigger_words",
    "offloading", "moments",
  ],
  SaraImageFolder: [
    "folder", "size", "max_buckets", "divisible_by", "crop", "crops", "max_upscale", "flip", "alpha",
    "background", "trigger", "default_caption", "repeats", "problems", "seed", "cache_gb",
  ],
};

// What was done before there was a widget, where that is not what a new node does.
const WAS = { select_from: "model" };

const saved = (node) => (node.widgets ?? []).filter((widget) => widget.serialize !== false);

export function ordered(values, before, widgets) {
  return widgets.map(({ name, value }) => {
    const found = before.indexOf(name);
    return found >= 0 && found < values.length ? values[found] : (WAS[name] ?? value);
  });
}

const known = new Map(); // type -> its widgets, as a new node has them

function widgetsOf(type) {
  if (!known.has(type)) {
    const fresh = LiteGraph.createNode(type);
    if (!fresh) return null;
    known.set(type, saved(fresh).map(({ name, value }) => ({ name, value })));
  }
  return known.get(type);
}

function reorder(nodes) {
  for (const node of nodes ?? []) {
    const before = node.properties?.[NAMES] ?? BEFORE[node.type];
    if (!before || !node.type?.startsWith("Sara") || !Array.isArray(node.widgets_values)) continue;
    const widgets = widgetsOf(node.type);
    if (!widgets) continue;
    node.widgets_values = ordered(node.widgets_values, before, widgets);
    node.properties = { ...node.properties, [NAMES]: widgets.map((widget) => widget.name) };
  }
}

app.registerExtension({
  name: "SaRA.Migrate",
  async beforeConfigureGraph(data) {
    reorder(data?.nodes);
    for (const subgraph of data?.definitions?.subgraphs ?? []) reorder(subgraph.nodes);
  },
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Sara")) return;
    const serialized = node.onSerialize;
    node.onSerialize = function (data) {
      const result = serialized?.apply(this, arguments);
      data.properties = { ...data.properties, [NAMES]: saved(node).map((widget) => widget.name) };
      return result;
    };
  },
});
