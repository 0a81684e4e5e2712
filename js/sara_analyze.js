// The histogram of SaRA Analyze: drag the line to choose the threshold.

import { app } from "../../scripts/app.js";
import { ACCENT, addCanvasWidget, bytes, short } from "./sara_chart.js";
import { follow } from "./sara_shown.js";
import { text } from "./sara_text.js";

const charts = new WeakMap(); // element -> what shows data in it; nodes may be proxies
const SMALLEST = 1e-6; // the widget's step; 0 would stand for the fraction
const LEFT = 8, RIGHT = 8, TOP = 8, BOTTOM = 16, BAR = 12;

// How many of the counted weights lie below a threshold; within a bin they are taken as even.
export function below(edges, counts, threshold) {
  let sum = 0;
  for (let i = 0; i < counts.length; i++) {
    if (edges[i + 1] <= threshold) sum += counts[i];
    else {
      if (edges[i] < threshold)
        sum += (counts[i] * (threshold - edges[i])) / (edges[i + 1] - edges[i]);
      break;
    }
  }
  return sum;
}

// Bytes of a delta with half-precision values: two, and the position, 0.2 bits above its entropy.
export function fileBytes(selected, total) {
  if (!selected) return 0;
  const p = Math.min(selected / total, 1);
  const rest = p < 1 ? ((1 - p) * Math.log2(1 / (1 - p))) / p : 0;
  return selected * (2 + (Math.log2(1 / p) + rest + 0.2) / 8);
}

function selectedBy(data, threshold, counts, zeros) {
  return below(data.edges, counts, threshold) + (data.skip_zeros ? 0 : zeros);
}

function widgetNamed(node, name) {
  return node.widgets?.find((widget) => widget.name === name);
}

function thresholdOf(node, data) {
  return widgetNamed(node, "threshold")?.value || data.threshold;
}

function scale(data, width) {
  const low = Math.log10(data.edges[0] || data.edges[1] / 2), high = Math.log10(data.edges.at(-1));
  return {
    toX: (value) => LEFT + ((Math.log10(value) - low) / (high - low)) * (width - LEFT - RIGHT),
    toValue: (x) => 10 ** (low + ((x - LEFT) / (width - LEFT - RIGHT)) * (high - low)),
    low, high,
  };
}

function draw(node, chart, context, width, height, colour) {
  const data = chart?.data;
  if (!data) {
    context.fillStyle = colour.faint;
    context.fillText(text("analyze_first"), LEFT, height / 2);
    return;
  }
  const threshold = thresholdOf(node, data), { toX, low, high } = scale(data, width);
  const tall = height - TOP - BOTTOM, most = Math.max(...data.counts);
  data.counts.forEach((count, i) => {
    const x = toX(data.edges[i] || data.edges[1] / 2), next = toX(data.edges[i + 1]);
    context.fillStyle = data.edges[i] < threshold ? ACCENT.selected : ACCENT.rest;
    const bar = (count / most) * tall;
    context.fillRect(x, TOP + tall - bar, Math.max(1, next - x - 0.5), bar);
  });
  context.fillStyle = colour.faint;
  context.textAlign = "center";
  for (let power = Math.ceil(low); power <= high; power++)
    context.fillText(`1e${power}`, toX(10 ** power), height - 4);
  const x = Math.min(Math.max(toX(threshold), LEFT), width - RIGHT);
  context.strokeStyle = colour.text;
  context.lineWidth = 2;
  context.beginPath();
  context.moveTo(x, TOP);
  context.lineTo(x, TOP + tall);
  context.stroke();
  if (chart.hover != null) {
    const value = scale(data, width).toValue(chart.hover);
    context.fillStyle = colour.text;
    context.textAlign = chart.hover > width / 2 ? "right" : "left";
    const count = short(selectedBy(data, value, data.counts, data.zeros));
    context.fillText(` ${text("below", { value: value.toPrecision(3), count })} `, chart.hover, TOP + 10);
  }
}

function describe(node, chart) {
  const { data, caption } = chart, threshold = thresholdOf(node, data);
  const selected = selectedBy(data, threshold, data.counts, data.zeros);
  const choice = text("selected", {
    threshold: threshold.toPrecision(3), count: short(selected), total: short(data.total),
    share: ((100 * selected) / data.total).toFixed(1),
  });
  const costs = text("costs", {
    size: bytes(fileBytes(selected, data.total)), memory: bytes(selected * data.bytes_per_weight),
  });
  caption.replaceChildren(document.createTextNode(`${choice}\n${costs}`));
  const list = document.createElement("div");
  list.style.cssText = "display:grid;grid-template-columns:auto 1fr auto;gap:1px 6px;margin-top:4px";
  for (const [name, total, zeros, counts] of data.blocks) {
    const share = selectedBy(data, threshold, counts, zeros) / Math.max(total, 1);
    const label = document.createElement("span"), bar = document.createElement("span");
    const value = document.createElement("span");
    label.textContent = name;
    value.textContent = `${(100 * share).toFixed(1)} %`;
    bar.style.cssText =
      `align-self:center;height:${BAR - 4}px;background:linear-gradient(to right,` +
      `${ACCENT.selected} ${100 * share}%,var(--border-color,#4e4e4e) ${100 * share}%)`;
    list.append(label, bar, value);
  }
  caption.append(list);
}

function setThreshold(node, value) {
  const widget = widgetNamed(node, "threshold");
  if (!widget) return;
  widget.value = Number(value.toPrecision(3));
  widget.callback?.(widget.value);
  node.graph?.setDirtyCanvas?.(true, true);
}

function followPointer(node, chart) {
  // The pointer is taken from the canvas below only over the plot itself.
  const { canvas } = chart;
  const position = (event) => {
    const rect = canvas.getBoundingClientRect(); // may be zoomed
    return ((event.clientX - rect.left) / rect.width) * canvas.clientWidth;
  };
  const choose = (event) => {
    const width = canvas.clientWidth;
    const x = Math.min(Math.max(position(event), LEFT), width - RIGHT);
    setThreshold(node, Math.max(scale(chart.data, width).toValue(x), SMALLEST));
  };
  canvas.style.touchAction = "none"; // a finger drags the line, too
  canvas.addEventListener("pointerdown", (event) => {
    if (!chart.data || event.button !== 0) return;
    event.stopPropagation();
    canvas.setPointerCapture(event.pointerId);
    chart.dragging = true;
    choose(event);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!chart.data) return;
    chart.hover = position(event);
    if (chart.dragging) {
      event.stopPropagation();
      choose(event);
    }
    chart.redraw();
  });
  canvas.addEventListener("lostpointercapture", () => (chart.dragging = false));
  canvas.addEventListener("pointerleave", () => {
    chart.hover = null;
    chart.redraw();
  });
}

const analysed = follow("sara_analysis", (node, data) =>
  charts.get(widgetNamed(node, "chart")?.element)?.(data));

app.registerExtension({
  name: "SaRA.Analyze",
  nodeCreated(node) {
    if (node.comfyClass !== "SaraAnalyze") return;
    const chart = addCanvasWidget(node, "chart", 190, (context, width, height, colour) =>
      draw(node, chart, context, width, height, colour));
    followPointer(node, chart);
    const refresh = () => {
      if (!chart.data) return;
      describe(node, chart);
      chart.fit();
      chart.redraw();
    };
    charts.set(chart.box, (data) => {
      chart.data = data;
      refresh();
    });
    const widget = widgetNamed(node, "threshold");
    if (widget) {
      const callback = widget.callback;
      widget.callback = function () {
        const result = callback?.apply(this, arguments);
        refresh();
        return result;
      };
    }
  },
  async setup() {
    await analysed.load();
  },
  async afterConfigureGraph() {
    analysed.again();
  },
});
