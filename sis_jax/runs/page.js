"use strict";
// The report's tool: one part alone on all samples; rename, merge, drop, undo; edits.json.
// Names come from a file: they reach the page as text only, never as markup.
(() => {
  const BACKGROUND = 0;
  const byId = (id) => document.getElementById(id);
  const run = JSON.parse(byId("run").textContent);
  const photos = [...document.querySelectorAll("img[data-photo]")];
  const history = [];
  let edits = run.levels.map(() => ({}));
  let level = run.levels.length - 1; // the finest first
  let chosen = null;
  let downloaded = "";

  // The name of a class with the edits, null in the background: there are the finer parts of a
  // part that was sent there, too.
  function nameOf(at, { id, name, parent }) {
    const dropped = at > 0 && edits[at - 1][parent] === null;
    return dropped ? null : edits[at][id] === undefined ? name : edits[at][id];
  }

  // Parts as they are with the edits: {id, name, members}, as `Parts.rename` makes them.
  function groups(at = level) {
    const found = new Map();
    for (const entry of run.levels[at].classes) {
      const given = nameOf(at, entry);
      const key = entry.id === BACKGROUND ? null : given;
      const group = found.get(key) || { id: entry.id, name: key, members: [] };
      group.members.push(entry.id);
      found.set(key, group);
    }
    if (found.has(null)) {
      const own = run.levels[at].classes.find((c) => c.id === BACKGROUND);
      Object.assign(found.get(null), { id: BACKGROUND, name: own ? own.name : "background" });
    }
    return [...found.values()].sort((a, b) => a.id - b.id);
  }

  const groupOf = (id) => groups().find((g) => g.members.includes(id));

  function edit(members, name, done) {
    history.push({ edits: JSON.stringify(edits), level, chosen });
    for (const id of members) {
      if (name === run.levels[level].classes.find((c) => c.id === id).name) delete edits[level][id];
      else edits[level][id] = name;
    }
    chosen = groupOf(members[0]).id;
    refresh(done);
  }

  function undo() {
    const before = history.pop();
    if (!before) return;
    ({ level, chosen } = before);
    edits = JSON.parse(before.edits);
    refresh("Undone.");
  }

  // All members of a part that was edited are named: names of finer parts follow the coarse ones.
  function content() {
    const levels = {};
    run.levels.forEach(({ classes }, at) => {
      const names = {};
      for (const group of groups(at)) {
        const edited = group.members.filter((id) => edits[at][id] !== undefined);
        const all = group.id === BACKGROUND ? edited : group.members;
        const kept = all.filter((id) =>
          !(at > 0 && edits[at - 1][classes.find((c) => c.id === id).parent] === null));
        const name = group.id === BACKGROUND ? null : group.name;
        if (edited.length) for (const id of kept) names[id] = name;
      }
      if (Object.keys(names).length) levels[at] = names;
    });
    return JSON.stringify({ format: 1, parts: run.parts, levels }, null, 1) + "\n";
  }

  const changes = () => edits.reduce((sum, names) => sum + Object.keys(names).length, 0);

  function download() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([content()], { type: "application/json" }));
    link.download = "edits.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    downloaded = content();
    refresh("edits.json is downloaded. Apply it with the command below.");
  }

  // Drawing: nothing is read back from a canvas, which some browsers falsify.

  // Class ids of a mask, written as id, count, id, count, ...
  function unpacked(runs, length) {
    const ids = new Uint8Array(length);
    for (let i = 0, at = 0; i < runs.length; i += 2) {
      ids.fill(runs[i], at, at + runs[i + 1]);
      at += runs[i + 1];
    }
    return ids;
  }

  const masks = run.masks.map((of) => of.map((runs) => unpacked(runs, run.width * run.height)));
  const zoom = Math.max(1, Math.ceil(192 / run.width));

  // A canvas in place of a fixed image of the page, which shows without scripts.
  function canvases(kind) {
    return [...document.querySelectorAll(`img[data-${kind}]`)].map((image, i) => {
      const canvas = document.createElement("canvas");
      canvas.width = run.width * zoom;
      canvas.height = run.height * zoom;
      canvas.setAttribute("role", "img");
      canvas.addEventListener("click", (event) => {
        const box = canvas.getBoundingClientRect();
        const x = Math.floor(((event.clientX - box.left) / box.width) * run.width);
        const y = Math.floor(((event.clientY - box.top) / box.height) * run.height);
        const group = groupOf(masks[level][i][y * run.width + x]);
        if (group) choose(group.id);
      });
      image.replaceWith(canvas);
      return canvas;
    });
  }

  // Pixels from colour(part, edge) -> [r, g, b, alpha], as a canvas.
  function layer(ids, owner, colour) {
    const w = run.width * zoom;
    const h = run.height * zoom;
    const at = (x, y) =>
      owner[ids[Math.min(run.height - 1, Math.floor(y / zoom)) * run.width
        + Math.min(run.width - 1, Math.floor(x / zoom))]];
    const data = new ImageData(w, h);
    for (let y = 0; y < h; y += 1) {
      for (let x = 0; x < w; x += 1) {
        const id = at(x, y);
        data.data.set(colour(id, id !== at(x + 1, y) || id !== at(x, y + 1)), 4 * (y * w + x));
      }
    }
    const canvas = document.createElement("canvas");
    canvas.width = w;
    canvas.height = h;
    canvas.getContext("2d").putImageData(data, 0, 0);
    return canvas;
  }

  function drawAll(found) {
    const owner = Array.from({ length: 256 }, (_, id) => id);
    for (const group of found) for (const id of group.members) owner[id] = group.id;
    const alone = found.find((g) => g.id === chosen);
    const what = alone ? `${alone.name} alone` : "all parts";
    photos.forEach((photo, i) => {
      const ids = masks[level][i];
      const flat = layer(ids, owner, (id) =>
        alone && id !== alone.id ? [128, 128, 128, 45] : [...run.colours[id], 255]);
      const tint = layer(ids, owner, (id, edge) => {
        if (alone) return [0, 0, 0, id === alone.id ? 0 : 215];
        if (edge) return [255, 255, 255, 190];
        if (id === BACKGROUND || id === 255) return [0, 0, 0, 0];
        return [...run.colours[id], 128];
      });
      paint(partCanvas[i], [[flat, "source-over"]]);
      const how = alone ? "destination-out" : "source-over";
      paint(overlayCanvas[i], [[photo, "source-over"], [tint, how]]);
      partCanvas[i].setAttribute("aria-label", `mask of image ${i + 1}: ${what}`);
      overlayCanvas[i].setAttribute("aria-label", `image ${i + 1}: ${what}`);
    });
  }

  function paint(canvas, layers) {
    const pen = canvas.getContext("2d");
    pen.globalCompositeOperation = "source-over";
    pen.clearRect(0, 0, canvas.width, canvas.height);
    for (const [image, how] of layers) {
      pen.globalCompositeOperation = how;
      pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    }
  }

  // Controls

  function button(text, pressed, act) {
    const made = document.createElement("button");
    made.type = "button";
    made.setAttribute("aria-pressed", String(pressed));
    made.addEventListener("click", act);
    made.append(text);
    return made;
  }

  function swatch(id) {
    const made = document.createElement("span");
    made.className = "dot";
    made.style.backgroundColor = `rgb(${run.colours[id].join()})`;
    return made;
  }

  // New buttons in place of the old; the focus stays on the one at the same place.
  function fill(place, buttons) {
    const at = [...place.children].indexOf(document.activeElement);
    place.replaceChildren(...buttons);
    if (at >= 0) buttons[Math.min(at, buttons.length - 1)].focus();
  }

  // Down: all finer parts; up: the part that the chosen one lies in.
  function go(to) {
    const alone = to < level && groups().find((g) => g.id === chosen);
    const parent = alone && run.levels[level].classes.find((c) => c.id === alone.members[0]).parent;
    level = to;
    chosen = typeof parent === "number" ? groupOf(parent).id : null;
    refresh("");
  }

  function choose(id) {
    chosen = chosen === id ? null : id;
    refresh("");
  }

  function controls(found) {
    const alone = found.find((g) => g.id === chosen);
    fill(byId("levels"), run.levels.map((one, i) =>
      button(one.title, i === level, () => go(i))));
    byId("levels").hidden = run.levels.length < 2;
    fill(byId("chips"), found.map((group) => {
      const made = button("", group.id === chosen, () => choose(group.id));
      made.append(swatch(group.id), group.name);
      return made;
    }));
    const fixed = !alone || alone.id === BACKGROUND;
    for (const id of ["name", "rename", "into", "merge", "drop"]) byId(id).disabled = fixed;
    byId("name").value = alone ? alone.name : "";
    const others = found.filter((g) => g.id !== chosen && g.id !== BACKGROUND);
    byId("into").replaceChildren(...others.map((g) => new Option(g.name, g.id)));
    if (!others.length) byId("merge").disabled = true;
    byId("undo").disabled = !history.length;
    byId("download").disabled = !changes();
    byId("next").hidden = !changes();
  }

  function table() {
    for (const row of document.querySelectorAll("tr[data-part]")) {
      const mine = Number(row.dataset.level) === level;
      const group = mine && groupOf(Number(row.dataset.part));
      if (!group) continue;
      const before = run.levels[level].classes.find((c) => c.id === Number(row.dataset.part));
      row.querySelector(".name").textContent =
        before && before.name !== group.name ? `${before.name} → ${group.name}` : group.name;
      row.classList.toggle("chosen", group.id === chosen);
    }
    for (const one of document.querySelectorAll("[data-table]")) {
      one.hidden = Number(one.dataset.table) !== level;
    }
  }

  function refresh(status) {
    const found = groups();
    drawAll(found);
    controls(found);
    table();
    const count = changes();
    const alone = found.find((g) => g.id === chosen);
    byId("status").textContent = status
      || (alone ? `Shows ${alone.name} alone.` : "Choose a part to see it alone and to edit it.");
    byId("count").textContent = count ? `${count} ${count === 1 ? "change" : "changes"}` : "";
  }

  const partCanvas = canvases("mask");
  const overlayCanvas = canvases("overlay");
  byId("edit").addEventListener("submit", (event) => {
    event.preventDefault();
    const alone = groups().find((g) => g.id === chosen);
    const name = byId("name").value.trim();
    if (!alone || !name || name === alone.name) return;
    const taken = groups().find((g) => g.name === name);
    const dropped = name === "background" || (taken && taken.id === BACKGROUND);
    edit(alone.members, dropped ? null : name,
      `${alone.name} is now ${taken || dropped ? "part of" : "called"} ${name}.`);
  });
  byId("merge").addEventListener("click", () => {
    const alone = groups().find((g) => g.id === chosen);
    const target = groups().find((g) => g.id === Number(byId("into").value));
    if (!alone || !target) return;
    edit(alone.members, target.name, `${alone.name} is now part of ${target.name}.`);
  });
  byId("drop").addEventListener("click", () => {
    const alone = groups().find((g) => g.id === chosen);
    if (alone) edit(alone.members, null, `${alone.name} is now background.`);
  });
  byId("undo").addEventListener("click", undo);
  byId("download").addEventListener("click", download);
  document.addEventListener("keydown", (event) => {
    if (event.target instanceof HTMLInputElement) return;
    if (event.key === "Escape" && chosen !== null) choose(chosen);
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) undo();
  });
  byId("chips").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const chips = [...byId("chips").children];
    const at = chips.indexOf(document.activeElement) + (step || 0);
    if (step && chips[at]) chips[at].focus();
  });
  window.addEventListener("beforeunload", (event) => {
    if (changes() && downloaded !== content()) event.preventDefault();
  });
  byId("tool").hidden = false;
  Promise.all(photos.map((photo) => photo.decode().catch(() => null))).then(() => refresh(""));
})();
