// What is in the folder of SaRA Image Folder, before anything is run: pictures, captions, what is wrong.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { addBoxWidget, addText, addWarning, followByAsking, scrolls } from "./sara_chart.js";
import { text } from "./sara_text.js";

const HEIGHT = 190, THUMBNAIL = 72;

function describe(folder, isOfVideos) {
  const captions = Object.entries(folder.captions)
    .map(([source, count]) => text("captions_from", { count, source })).join(", ");
  return [
    isOfVideos ? text("videos", { count: folder.pictures }) : text("pictures", { count: folder.pictures }),
    captions,
    folder.problem_count ? text("problems", { count: folder.problem_count }) : "",
  ].filter(Boolean).join(", ");
}

function warn(folder) {
  if (!folder.pictures) return "";
  if (folder.without === folder.pictures) return text("no_captions");
  if (folder.without) return text("without_caption", { count: folder.without });
  return folder.same ? text("same_captions") : "";
}

function thumbnail({ name, caption, file, changed }, folder) {
  const cell = document.createElement("figure"), label = document.createElement("figcaption");
  cell.style.cssText = `margin:0 4px 4px 0;width:${THUMBNAIL}px;flex:none`;
  if (file != null) {
    const picture = document.createElement("img");
    picture.src = api.apiURL(`/sara/thumbnail?${new URLSearchParams({ folder, name: file, changed })}`);
    picture.loading = "lazy";
    picture.alt = name;
    picture.style.cssText = `width:${THUMBNAIL}px;height:${THUMBNAIL}px;object-fit:cover;display:block`;
    cell.append(picture);
  }
  label.textContent = caption || "-";
  cell.title = `${name}\n${caption ?? ""}`;
  label.style.cssText =
    "font-size:9px;line-height:1.2;max-height:2.4em;overflow:hidden;overflow-wrap:anywhere";
  cell.append(label);
  return cell;
}

async function show(card, widget, subfolders) {
  const name = widget.value;
  if (widget.options?.values?.indexOf?.(name) === 0) { // what stands there before one is chosen
    card.query = null;
    card.caption.textContent = text("choose_folder");
    card.warning.style.display = "none";
    card.pictures.replaceChildren();
    return;
  }
  const asked = { name: name ?? "", subfolders: subfolders?.value ?? false };
  const query = card.query = `${new URLSearchParams(card.isOfVideos ? { ...asked, kind: "video" } : asked)}`;
  let folder;
  try {
    const answer = await api.fetchApi(`/sara/folder?${query}`);
    folder = await answer.json();
  } catch (error) {
    folder = { error: error.message };
  }
  if (card.query !== query) return; // another one was chosen meanwhile
  card.caption.textContent = folder.error ?? describe(folder, card.isOfVideos);
  card.caption.title = (folder.problems ?? []).join("\n");
  card.warning.textContent = folder.error ? "" : warn(folder);
  card.warning.style.display = card.warning.textContent ? "block" : "none";
  card.pictures.replaceChildren(...(folder.shown ?? []).map((one) => thumbnail(one, name)));
}

app.registerExtension({
  name: "SaRA.Folder",
  nodeCreated(node) {
    if (!["SaraImageFolder", "SaraVideoFolder"].includes(node.comfyClass)) return;
    const widget = node.widgets?.find((one) => one.name === "folder");
    if (!widget) return;
    const { box } = addBoxWidget(node, "card", () => HEIGHT, "sara-folder");
    const card = {
      isOfVideos: node.comfyClass === "SaraVideoFolder", caption: addText(box), warning: addWarning(box),
      pictures: document.createElement("div"),
    };
    card.caption.style.minHeight = "0";
    card.caption.style.flex = card.warning.style.flex = "none";
    card.warning.style.display = "none";
    scrolls(card.pictures);
    card.pictures.style.cssText =
      "display:flex;flex-wrap:wrap;overflow-y:auto;flex:1 1 auto;padding:2px 4px;color:var(--input-text,#ddd)";
    box.append(card.pictures);
    const subfolders = node.widgets.find((one) => one.name === "subfolders");
    followByAsking(node, [widget, subfolders].filter(Boolean), () => show(card, widget, subfolders));
  },
});
