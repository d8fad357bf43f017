"use strict";

// --- charts: which one is shown, which rows, and the name of a point ---

for (const select of document.querySelectorAll("select.choose")) {
  const show = () => {
    const figures = document.getElementById(select.dataset.of).querySelectorAll("figure");
    figures.forEach((figure, k) => { figure.hidden = k !== Number(select.value); });
  };
  select.addEventListener("change", show);
  show(); // without this script all of them are there
}

for (const field of document.querySelectorAll("fieldset.switches")) {
  field.addEventListener("change", (event) => {
    const curves = document.getElementById(field.dataset.of).querySelectorAll(`[data-row="${event.target.value}"]`);
    for (const curve of curves) curve.style.display = event.target.checked ? "" : "none";
  });
}

const tip = document.createElement("div");
tip.id = "tip";
tip.hidden = true;
document.body.append(tip);
document.addEventListener("pointermove", (event) => {
  const point = event.target.closest ? event.target.closest(".point[data-name]") : null;
  tip.hidden = point === null;
  if (point === null) return;
  tip.textContent = point.dataset.name;
  tip.style.left = `${Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)}px`;
  tip.style.top = `${Math.max(event.clientY - tip.offsetHeight - 10, 4)}px`;
});

// --- the viewer ---

const NOTCH = 80; // pixels of a wheel's step; touchpads send fewer at a time

const holder = document.getElementById("viewer");
if (holder !== null) view(JSON.parse(holder.textContent));

function view(data) {
  const byId = (id) => document.getElementById(id);
  const shown = new Map([["reference", true], ...data.names.map((name, k) => [name, k === data.names.length - 1])]);
  const disagree = data.differ.name;
  const state = { place: [0, 0, 0], now: null, disagree: false };
  // Solid, dashed and dotted edges of pixels, by share of an edge that is drawn; the last map, the answer, is white.
  const edges = [[0, 1], [0.15, 0.85], [0.35, 0.65]];

  data.cases.forEach((one, k) => byId("case").append(new Option(one.title, k)));
  [...shown.keys(), disagree].forEach((name) => {
    const box = document.createElement("input");
    const label = document.createElement("label");
    box.type = "checkbox";
    box.dataset.name = name;
    box.checked = shown.get(name) === true;
    box.addEventListener("change", () => {
      if (name === disagree) state.disagree = box.checked;
      else shown.set(name, box.checked);
      draw();
    });
    label.append(box, ` ${name.replaceAll("_", " ")}`);
    byId("names").append(label);
  });
  if (data.names.length < 2) boxOf(disagree).disabled = true;

  const planes = data.planes.map((name, axis) => {
    const plane = document.createElement("div");
    plane.className = "plane";
    const frame = document.createElement("div");
    frame.className = "frame";
    const canvas = document.createElement("canvas");
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "img");
    canvas.dataset.plane = name;
    const slider = document.createElement("input");
    slider.type = "range";
    slider.min = 1;
    slider.setAttribute("aria-label", `${name} slice`);
    const caption = document.createElement("div");
    frame.append(canvas);
    plane.append(caption, frame, slider);
    byId("planes").append(plane);
    slider.addEventListener("input", () => move(axis, Number(slider.value) - 1));
    let turned = 0;
    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey) return; // zooms the page
      event.preventDefault();
      const delta = event.deltaY || event.deltaX;
      turned = event.deltaMode === 0 ? turned + delta : NOTCH * Math.sign(delta);
      const steps = Math.trunc(turned / NOTCH) || (Math.abs(delta) >= NOTCH / 2 ? Math.sign(delta) : 0);
      if (steps === 0) return; // a touchpad has not gone far enough yet
      turned = 0;
      move(axis, state.place[axis] + Math.sign(steps));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const last = state.now.shape[axis] - 1;
      const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -last, End: last };
      if (!(event.key in steps)) return;
      event.preventDefault();
      move(axis, state.place[axis] + steps[event.key]);
    });
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const { across, down, sizes } = geometry(axis);
      const x = Math.floor((event.clientX - box.left) / box.width * sizes[0]);
      const y = Math.floor((event.clientY - box.top) / box.height * sizes[1]);
      move(across, x);
      move(down, data.flip && axis > 0 ? sizes[1] - 1 - y : y);
    });
    return { canvas, slider, caption, name };
  });

  byId("case").addEventListener("change", () => choose(Number(byId("case").value)));
  for (const id of ["level", "window", "zoom"]) byId(id).addEventListener("input", draw);
  for (const radio of document.querySelectorAll("input[name=style]")) radio.addEventListener("change", draw);
  document.addEventListener("keydown", (event) => {
    if (event.target.tagName === "SELECT") return;
    const boxes = [...byId("names").querySelectorAll("input")];
    const step = { "[": -1, "]": 1, p: -1, n: 1 }[event.key]; // brackets need AltGr on some keyboards
    if ((event.ctrlKey || event.metaKey || event.altKey) && !["[", "]"].includes(event.key)) return;
    if (event.key >= "1" && event.key <= "9" && boxes[event.key - 1]) boxes[event.key - 1].click();
    else if (event.key === "d") boxes.at(-1).click();
    else if (event.key === "f") document.querySelector("input[name=style]:not(:checked)").click();
    else if (step && data.cases[Number(byId("case").value) + step]) {
      byId("case").value = Number(byId("case").value) + step;
      byId("case").dispatchEvent(new Event("change"));
    }
  });
  choose(Number(byId("case").value));

  function boxOf(name) {
    return [...byId("names").querySelectorAll("input")].find((box) => box.dataset.name === name);
  }

  // Across each axis: which axes lie across and down the picture, and how many voxels these have.
  function geometry(axis) {
    const [across, down] = [[2, 1], [2, 0], [1, 0]][axis];
    return { across, down, sizes: [state.now.shape[across], state.now.shape[down]] };
  }

  function choose(k) {
    show(k).catch((error) => {
      byId("failed").hidden = false;
      byId("failed").textContent = `This browser cannot show ${data.cases[k].name} (${error.message}): try another one.`;
    });
  }

  async function show(k) {
    const one = data.cases[k];
    const decode = (address, isScan) => unfold(address, one, isScan);
    const names = Object.keys(one.maps);
    const [scan, reference, ...maps] = await Promise.all([
      decode(one.image, true), decode(one.reference, false), ...names.map((name) => decode(one.maps[name], false))]);
    if (Number(byId("case").value) !== k) return; // another one was chosen meanwhile
    state.now = { ...one, scan, maps: new Map([["reference", reference], ...names.map((name, i) => [name, maps[i]])]) };
    for (const name of data.names) boxOf(name).disabled = !state.now.maps.has(name);
    state.place = fullest(reference, one.shape);
    planes.forEach((plane, axis) => { plane.slider.max = one.shape[axis]; });
    tell();
    draw();
    document.body.dataset.case = one.name;
  }

  // A mosaic's slices one after another, as numbers.
  async function unfold(address, one, isScan) {
    const picture = new Image();
    picture.src = address;
    await picture.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [picture.naturalWidth, picture.naturalHeight];
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    const [depth, height, width] = one.shape;
    const volume = isScan ? new Uint8Array(depth * height * width) : new Uint16Array(depth * height * width);
    for (let z = 0, to = 0; z < depth; z++) {
      for (let y = 0; y < height; y++) {
        let from = 4 * ((Math.floor(z / one.columns) * height + y) * canvas.width + (z % one.columns) * width);
        for (let x = 0; x < width; x++, to++, from += 4) volume[to] = isScan ? pixels[from] : pixels[from] + 256 * pixels[from + 1];
      }
    }
    return volume;
  }

  // The slice of each axis with most foreground; the middle where there is none.
  function fullest(labels, shape) {
    const counts = shape.map((size) => new Uint32Array(size));
    const [depth, height, width] = shape;
    for (let z = 0, i = 0; z < depth; z++) {
      for (let y = 0; y < height; y++) {
        for (let x = 0; x < width; x++, i++) if (labels[i]) { counts[0][z]++; counts[1][y]++; counts[2][x]++; }
      }
    }
    return counts.map((each) => { const most = Math.max(...each); return most ? each.indexOf(most) : each.length >> 1; });
  }

  function tell() {
    const one = state.now;
    const table = document.createElement("table");
    for (const [row, cells] of one.scores.entries()) {
      const line = table.insertRow();
      for (const text of cells) {
        const cell = document.createElement(row === 0 ? "th" : "td");
        cell.textContent = text;
        line.append(cell);
      }
    }
    byId("scores").replaceChildren(table);
    const legend = byId("legend");
    legend.replaceChildren();
    const add = (colour, text) => {
      const swatch = document.createElement("span");
      swatch.className = "swatch";
      swatch.style.background = colour;
      legend.append(swatch, text);
    };
    data.structures.slice(0, 12).forEach((name, k) => add(data.colours[k % data.colours.length], name));
    add(data.disagreement, data.differ.name);
    const told = data.names.map((name, k) => `${name.replaceAll("_", " ")} ${lineOf(k).said}`);
    legend.append(` · contours: reference solid, ${told.join(", ")}`);
    if (!one.spacing) legend.append(" · the spacing is unknown: voxels are drawn as cubes");
  }

  function lineOf(k) {
    if (k === data.names.length - 1) return { edge: edges[1], isWhite: true, said: "white, dashed" };
    return k % 2 === 0 ? { edge: edges[1], said: "dashed" } : { edge: edges[2], said: "dotted" };
  }

  function move(axis, to) {
    if (state.now === null) return;
    state.place[axis] = Math.min(Math.max(to, 0), state.now.shape[axis] - 1);
    draw();
  }

  function draw() {
    if (state.now === null) return;
    const { low, high, unit } = { ...state.now, unit: (state.now.high - state.now.low) / 255 };
    const [level, wide] = [Number(byId("level").value), Number(byId("window").value)];
    const digits = high - low < 20 ? 2 : 0;
    byId("intensities").textContent = `${(low + (level - wide / 2) * unit).toFixed(digits)} to ${(low + (level + wide / 2) * unit).toFixed(digits)}`;
    planes.forEach((plane, axis) => paint(plane, axis, level - wide / 2, wide));
  }

  function slice(volume, axis) {
    const { shape } = state.now;
    const { across, down, sizes: [width, height] } = geometry(axis);
    const strides = [shape[1] * shape[2], shape[2], 1];
    const begin = state.place[axis] * strides[axis];
    const isFlipped = data.flip && axis > 0;
    const out = new Uint16Array(width * height);
    for (let y = 0, i = 0; y < height; y++) {
      const line = begin + (isFlipped ? height - 1 - y : y) * strides[down];
      for (let x = 0; x < width; x++, i++) out[i] = volume[line + x * strides[across]];
    }
    return out;
  }

  function paint(plane, axis, black, wide) {
    const { across, down, sizes: [width, height] } = geometry(axis);
    const grey = slice(state.now.scan, axis);
    const maps = new Map();
    for (const [name, volume] of state.now.maps) maps.set(name, slice(volume, axis));
    const isFill = document.querySelector("input[name=style]:checked").value === "fill";
    const pixels = new ImageData(width, height);
    const blend = (i, colour) => {
      for (let c = 0; c < 3; c++) {
        const part = parseInt(colour.slice(1 + 2 * c, 3 + 2 * c), 16);
        pixels.data[4 * i + c] = (1 - data.opacity) * pixels.data[4 * i + c] + data.opacity * part;
      }
    };
    const colourOf = (label) => data.colours[(label - 1) % data.colours.length];
    const visible = [...maps].filter(([name]) => shown.get(name));
    const compared = data.differ.of.length ? data.differ.of : visible.map(([name]) => name).filter((name) => name !== "reference");
    const differing = state.disagree ? compared.map((name) => maps.get(name)).filter(Boolean) : [];
    let different = 0;
    for (let i = 0; i < grey.length; i++) {
      const value = 255 * (grey[i] - black) / wide;
      pixels.data.set([value, value, value, 255], 4 * i);
      if (isFill) for (const [, labels] of visible) if (labels[i]) blend(i, colourOf(labels[i]));
      if (differing.some((labels) => labels[i] !== differing[0][i])) {
        different++;
        blend(i, data.disagreement);
      }
    }
    const spacing = state.now.spacing || [1, 1, 1];
    const [right, below] = [spacing[across], spacing[down]].map((side) => side / Math.min(...spacing));
    const room = Math.max(200, Math.min(420, document.body.clientWidth / 3 - 24));
    const scale = Number(byId("zoom").value) * Math.min(room / (width * right), room / (height * below));
    const [sx, sy] = [scale * right, scale * below];
    const { canvas } = plane;
    [canvas.width, canvas.height] = [Math.max(1, Math.round(width * sx)), Math.max(1, Math.round(height * sy))];
    const small = document.createElement("canvas");
    [small.width, small.height] = [width, height];
    small.getContext("2d").putImageData(pixels, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = !isFill && !state.disagree;
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
    if (!isFill) for (const [name, labels] of visible) outline(context, name, labels, width, height, sx, sy);
    const said = visible.map(([name, labels]) => `${name} ${labels.reduce((sum, label) => sum + (label > 0), 0)} pixels`);
    if (state.disagree) said.push(differing.length > 1 ? `they disagree in ${different} pixels` : "show two to see where they disagree");
    canvas.setAttribute("aria-label", `${state.now.name}, ${plane.name} slice ${state.place[axis] + 1}: ${said.join(", ")}`);
    plane.slider.value = state.place[axis] + 1;
    plane.caption.textContent = `${plane.name} ${state.place[axis] + 1} of ${state.now.shape[axis]}`;
  }

  // The edges between pixels of different labels, each in the colour of its label.
  function outline(context, name, labels, width, height, sx, sy) {
    const { edge: [from, to], isWhite } = name === "reference" ? { edge: edges[0] } : lineOf(data.names.indexOf(name));
    const paths = new Map();
    const pathOf = (label) => {
      if (!paths.has(label)) paths.set(label, new Path2D());
      return paths.get(label);
    };
    const at = (x, y) => (x < 0 || y < 0 || x >= width || y >= height ? 0 : labels[y * width + x]);
    for (let y = 0; y <= height; y++) {
      for (let x = 0; x <= width; x++) {
        const [here, left, above] = [at(x, y), at(x - 1, y), at(x, y - 1)];
        if (here !== left) {
          const path = pathOf(here || left);
          path.moveTo(x * sx, (y + from) * sy);
          path.lineTo(x * sx, (y + to) * sy);
        }
        if (here !== above) {
          const path = pathOf(here || above);
          path.moveTo((x + from) * sx, y * sy);
          path.lineTo((x + to) * sx, y * sy);
        }
      }
    }
    context.lineWidth = name === "reference" ? 2 : 1.5;
    for (const [label, path] of paths) {
      context.strokeStyle = isWhite ? "#ffffff" : data.colours[(label - 1) % data.colours.length];
      context.stroke(path);
    }
  }
}
