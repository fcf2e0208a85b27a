// The explorer's canvas: two panes (an image under a palette PNG), the curve, the class legend, the thumbnails. Numbers come from the kernel.

const SVG = "http://www.w3.org/2000/svg";

function make(parent, tag, name = "", text = "") {
  const node = document.createElement(tag);
  node.className = name;
  node.textContent = text; // never markup: names are the user's
  parent.append(node);
  return node;
}

function draw(parent, tag, attributes, text = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  parent.append(node);
}

function show(img, bytes) {
  URL.revokeObjectURL(img.src);
  img.hidden = !bytes?.byteLength;
  if (img.hidden) img.removeAttribute("src");
  else img.src = URL.createObjectURL(new Blob([bytes]));
}

function curve(box, panes) {
  box.replaceChildren();
  const found = panes.map((pane, k) => ({ ...pane, k })).filter((pane) => pane.curve?.length);
  box.hidden = !found.length;
  if (box.hidden) return;
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 -6 300 196");
  box.append(svg);
  const lowest = Math.min(...found.flatMap((pane) => pane.curve.map((point) => point[1])));
  const low = Math.max(0, Math.min(90, Math.floor(lowest / 10) * 10));
  const x = (share) => 36 + 2.52 * share;
  const y = (accuracy) => 150 - (136 * (accuracy - low)) / (100 - low);
  for (const share of [0, 25, 50, 75, 100]) draw(svg, "text", { x: x(share), y: 166, "text-anchor": "middle" }, share);
  for (const accuracy of [low, (low + 100) / 2, 100]) {
    draw(svg, "line", { x1: 36, x2: 288, y1: y(accuracy), y2: y(accuracy), class: "grid" });
    draw(svg, "text", { x: 30, y: y(accuracy) + 4, "text-anchor": "end" }, accuracy);
  }
  draw(svg, "text", { x: 162, y: 184, "text-anchor": "middle" }, "pixels kept (%)");
  draw(svg, "text", { x: 36, y: 3 }, "accuracy of the kept (%)");
  for (const { k, curve: points, now } of found) {
    const path = points.map(([share, accuracy], i) => `${i ? "L" : "M"}${x(share).toFixed(1)} ${y(accuracy).toFixed(1)}`).join("");
    draw(svg, "path", { d: path, class: `pane${k}` });
    if (now) draw(svg, "circle", { cx: x(now[0]), cy: y(now[1]), r: 4.5, class: `pane${k}` });
  }
}

function legend(table, rows) {
  table.replaceChildren();
  const head = make(make(table, "thead"), "tr");
  make(head, "th", "", "class");
  for (const what of ["pixels %", "kept %", "right %"]) make(head, "th", "", what).colSpan = 2;
  const body = make(table, "tbody");
  for (const { name, colour, cells } of rows) {
    const row = make(body, "tr");
    const first = make(row, "td");
    make(first, "span", "mkd-swatch").style.background = colour;
    first.append(name);
    cells.forEach((text, k) => make(row, "td", `mkd-pane${k % 2}`, text));
  }
}

export default {
  render({ model, el }) {
    const root = make(el, "div", "mkd-explorer");
    root.tabIndex = 0;
    root.dataset.lmSuppressShortcuts = "true"; // JupyterLab leaves our keys to us
    const message = make(root, "div", "mkd-message");
    message.setAttribute("role", "alert");
    const middle = make(root, "div", "mkd-middle");
    const left = make(middle, "div", "mkd-left");
    const stage = make(left, "div", "mkd-stage");
    const panes = [0, 1].map((k) => {
      const pane = make(stage, "div", `mkd-pane mkd-pane${k}`);
      const title = make(pane, "div", "mkd-title");
      const picture = make(pane, "div", "mkd-picture");
      const image = make(picture, "img", "mkd-image");
      const mask = make(picture, "img", "mkd-mask");
      mask.draggable = image.draggable = false;
      mask.onload = () => (root.dataset.drawn = Number(root.dataset.drawn || 0) + 1);
      return { pane, title, picture, image, mask, key: make(pane, "div", "mkd-key") };
    });
    const readout = make(left, "div", "mkd-readout");
    const side = make(middle, "div", "mkd-side");
    const graph = make(side, "div", "mkd-curve");
    const note = make(side, "div", "mkd-note");
    const table = make(make(side, "div", "mkd-scroll"), "table", "mkd-legend");
    const progress = make(root, "div", "mkd-progress");
    const strip = make(root, "div", "mkd-strip");
    const command = (name, id = "") => model.send({ command: name, id });

    // A pixel is asked for while the pointer moves; a click holds it until the next one; a double click enlarges both panes there.
    let held = false;
    panes.forEach(({ picture, image }, k) => {
      const ask = (event) => {
        const box = image.getBoundingClientRect(); // of the enlarged image
        const side = [image.naturalWidth, image.naturalHeight];
        const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        model.set("pointer", [k, ...at.map((share, i) => Math.max(0, Math.min(side[i] - 1, Math.floor(share * side[i]))))]);
        model.save_changes();
      };
      picture.onpointermove = (event) => held || ask(event);
      picture.onclick = (event) => {
        held = !held;
        root.classList.toggle("mkd-held", held);
        ask(event);
      };
      picture.ondblclick = (event) => {
        const box = picture.getBoundingClientRect();
        const at = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
        stage.style.setProperty("--at", at.map((share) => `${100 * share}%`).join(" "));
        stage.classList.toggle("mkd-zoomed");
      };
    });

    root.onkeydown = (event) => {
      const name = { ArrowRight: "next", ArrowLeft: "previous", r: "random" }[event.key];
      if (!name || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      event.stopPropagation();
      command(name);
    };

    const update = {
      state() {
        const state = model.get("state");
        message.textContent = state.message || "";
        message.hidden = !state.message;
        middle.hidden = !state.panes; // nothing of the image before stays beside a message
        if (!state.panes) return;
        state.panes.forEach((found, k) => {
          const { title, key, picture } = panes[k];
          title.replaceChildren();
          make(title, "b", "", "AB"[k]);
          make(title, "span", "", found.title);
          make(title, "small", "", found.numbers);
          panes[k].pane.style.setProperty("--ratio", found.size[0] / found.size[1]);
          picture.classList.toggle("mkd-small", found.size[0] < 400);
          key.replaceChildren();
          for (const [colour, text] of found.key) {
            if (colour) make(key, "span", "mkd-swatch").style.background = colour;
            make(key, "span", "", text);
          }
        });
        curve(graph, state.panes);
        note.textContent = state.note;
        legend(table, state.legend);
        update.current();
      },
      current: () => [...strip.children].forEach((node) => node.classList.toggle("mkd-on", node.title === model.get("state").id)),
      strip() {
        strip.replaceChildren();
        for (const { id, png } of model.get("strip")) {
          const button = make(strip, "button");
          button.title = id;
          show(make(button, "img"), png);
          button.onclick = () => command("show", id);
        }
        update.current();
      },
      pixel: () => (readout.textContent = model.get("pixel") || "Point at a pixel: class, confidence, runners-up. Click: hold it. Double click: zoom. Keys: ← → r."),
      progress: () => (progress.textContent = model.get("progress")),
      opacity: () => root.style.setProperty("--opacity", model.get("opacity")),
      image_a: () => show(panes[0].image, model.get("image_a")),
      image_b: () => show(panes[1].image, model.get("image_b")),
      mask_a: () => show(panes[0].mask, model.get("mask_a")),
      mask_b: () => show(panes[1].mask, model.get("mask_b")),
    };
    for (const [name, change] of Object.entries(update)) {
      if (name !== "current") model.on(`change:${name}`, change);
      change();
    }
  },
};
