// Drawing that the widgets share: a canvas that follows its element's size and the palette's colours.

import { app } from "../../scripts/app.js";

const boxes = new Map(); // element -> its node, as long as that is in a graph
const redraws = new Map(); // element -> what draws it anew
const TALLEST = 160; // lines of text that are more are scrolled
const COLOURS = {
  text: ["--input-text", "#ddd"],
  faint: ["--descrip-text", "#999"],
  line: ["--border-color", "#4e4e4e"],
  back: ["--comfy-input-bg", "#222"],
};
export const ACCENT = { raw: "#6b8db5", smooth: "#4aa3ff", validation: "#ff9f40", selected: "#4aa3ff",
  rest: "#777777", saved: "#3fb950", error: "#f85149", cancelled: "#999999", stage: "#b083f0" };

export function colours(element) {
  const style = getComputedStyle(element);
  const found = {};
  for (const [name, [variable, fallback]] of Object.entries(COLOURS))
    found[name] = style.getPropertyValue(variable).trim() || fallback;
  return found;
}

// Adds a display-only widget, an element that is in neither the prompt nor the workflow. `height()` is
// how tall it has to be at the least; call `fit` when that has changed.
export function addBoxWidget(node, name, height, className) {
  const box = document.createElement("div");
  box.className = className;
  box.style.cssText =
    `display:flex;flex-direction:column;min-height:${height()}px;width:100%;overflow:hidden`;
  const widget = node.addDOMWidget(name, "sara_chart", box, {
    serialize: false, // not into the prompt
    getMinHeight: height,
    getValue: () => undefined,
    setValue: () => {},
  });
  widget.serialize = false; // not into the workflow either
  whileInGraph(node, () => boxes.set(box, node), () => boxes.delete(box));
  letWheelThrough(box);

  function fit() {
    box.style.minHeight = `${height()}px`;
    const [width, least] = node.computeSize();
    if (node.size[1] >= least) return;
    node.setSize([Math.max(node.size[0], width), least]);
    node.graph?.setDirtyCanvas?.(true, true);
  }
  return { box, fit };
}

// Calls `added` when a node comes into a graph, and `removed` when it leaves it; some are made for a moment only.
function whileInGraph(node, added, removed) {
  for (const [event, does] of [["onAdded", added], ["onRemoved", removed]]) {
    const before = node[event];
    node[event] = function () {
      does();
      return before?.apply(this, arguments);
    };
  }
}

// Over what cannot be scrolled the wheel zooms, as over the rest of the canvas.
function letWheelThrough(box) {
  box.addEventListener("wheel", (event) => {
    if (LiteGraph.vueNodesMode) return; // which does it by itself
    const part = event.target.closest?.("[data-scrolls]");
    const isAside = Math.abs(event.deltaX) > Math.abs(event.deltaY);
    if (!event.ctrlKey && part && (isAside ? part.scrollWidth > part.clientWidth : part.scrollHeight > part.clientHeight)) {
      event.stopPropagation();
      return;
    }
    event.preventDefault();
    app.canvas?.processMouseWheel?.(event);
  }, { passive: false });
}

// Marks a part of a box that is scrolled, by the wheel and by keys, where there is more in it.
export function scrolls(part) {
  part.dataset.scrolls = part.dataset.captureWheel = "true";
  part.tabIndex = 0;
}

export function addText(box) {
  const text = document.createElement("div");
  text.style.cssText =
    "font:11px sans-serif;line-height:1.35;min-height:30px;padding:2px 4px;white-space:pre-line;" +
    `color:var(--input-text,#ddd);overflow-y:auto;overflow-wrap:anywhere;max-height:${TALLEST}px`;
  scrolls(text);
  box.append(text);
  return text;
}

// Lines of text that stand out, for what is amiss.
export function addWarning(box) {
  const text = addText(box);
  text.style.borderLeft = `3px solid ${ACCENT.validation}`;
  text.style.minHeight = "0";
  return text;
}

// How tall a part of a box has to be.
function heightOf(part) {
  if (part.style.display === "none") return 0;
  const least = Number(part.dataset.height ?? 0) || parseFloat(part.style.minHeight) || 0;
  const content = Math.max(part.scrollHeight, part.offsetHeight); // without borders, and with them
  return part.dataset.height ? least : Math.max(least, Math.min(content, TALLEST));
}

// A widget with a canvas, lines of text and further elements below it; `draw(context, width, height,
// colours)` is called whenever the size changes or `redraw` is called.
export function addCanvasWidget(node, name, height, draw) {
  const canvas = document.createElement("canvas");
  canvas.dataset.height = height;
  canvas.style.cssText = `width:100%;flex:1 1 ${height}px;min-height:${height}px;display:block`;
  const parts = () => [...(canvas.parentElement?.children ?? [canvas])];
  const least = () => parts().reduce((sum, part) => sum + heightOf(part), 0);
  const { box, fit } = addBoxWidget(node, name, least, "sara-chart");
  box.append(canvas);
  const caption = addText(box);

  function redraw() {
    const rect = canvas.getBoundingClientRect();
    const width = canvas.clientWidth || rect.width, tall = canvas.clientHeight || rect.height;
    if (!width || !tall) return;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(tall * ratio);
    const context = canvas.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, width, tall);
    context.font = "10px sans-serif";
    draw(context, width, tall, colours(box));
  }

  const observer = new ResizeObserver(redraw);
  whileInGraph(node, () => {
    observer.observe(canvas);
    redraws.set(box, redraw);
  }, () => {
    observer.disconnect();
    redraws.delete(box);
  });
  return { box, canvas, caption, redraw, fit };
}

// A graph that is made anew, by undo or another tab, may have nodes of the same ids. Vue nodes then go on
// showing the elements of the nodes before; this puts the new ones in their place.
// Whether the open workflow has a node with this element; nodes and graphs themselves may be proxies.
function isThere(box, node) {
  const root = app.rootGraph ?? app.graph, id = node.graph?.id;
  const graph = id === root?.id ? root : root?.subgraphs?.get?.(id);
  return Boolean(graph?.getNodeById?.(node.id)?.widgets?.some((widget) => widget.element === box));
}

function takePlaces() {
  for (const [box, node] of boxes) {
    if (!isThere(box, node)) { // of a subgraph that is gone, whose nodes are not told so
      node.onRemoved?.();
      continue;
    }
    const shown = document.querySelector(`[data-node-id="${node.id}"] .${box.className}`);
    if (shown && shown !== box) shown.replaceWith(box);
  }
}

app.registerExtension({
  name: "SaRA.Charts",
  async setup() {
    app.ui?.settings?.addEventListener?.("Comfy.ColorPalette.change", () =>
      requestAnimationFrame(() => redraws.forEach((redraw) => redraw())));
  },
  async refreshComboInNodes() {
    cards.forEach((later) => later());
  },
  async afterConfigureGraph() {
    for (const delay of [0, 200, 1000]) setTimeout(takePlaces, delay); // Vue draws when it likes
  },
});

// The node that an execution id such as "12" or "57:3" (within a subgraph) stands for.
export function nodeOf(graph, id) {
  let found = null, inside = graph;
  for (const part of String(id).split(":")) {
    found = inside?.getNodeById?.(Number(part)) ?? inside?.getNodeById?.(part);
    inside = found?.subgraph;
  }
  return found;
}

// Calls `show` now, and whenever a widget's value changes or a workflow sets it.
export function followWidget(node, widget, show) {
  for (const [owner, event] of [[widget, "callback"], [node, "onConfigure"]]) {
    const before = owner[event];
    owner[event] = function () {
      const result = before?.apply(this, arguments);
      show();
      return result;
    };
  }
  show();
}

const WAIT = 50, asking = new WeakMap(), cards = new Map(); // node -> what asks for its card anew

// Calls `ask` once a node is in a graph, whenever one of the widgets has changed, and when lists are refreshed (R);
// of changes at one time only the last counts.
export function followByAsking(node, widgets, ask) {
  const later = () => {
    clearTimeout(asking.get(ask));
    asking.set(ask, setTimeout(() => node.graph && ask(), WAIT));
  };
  whileInGraph(node, () => {
    cards.set(node, later);
    later();
  }, () => cards.delete(node));
  for (const widget of widgets) followWidget(node, widget, later);
}

export function short(number) {
  for (const [unit, size] of [["B", 1e9], ["M", 1e6], ["k", 1e3]])
    if (number >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return String(Math.round(number));
}

export function bytes(number) {
  for (const [unit, size] of [["GB", 1e9], ["MB", 1e6], ["kB", 1e3]])
    if (number >= size) return `${(number / size).toPrecision(3)} ${unit}`;
  return `${Math.round(number)} B`;
}
