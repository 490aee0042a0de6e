"use strict";
// Two things: pictures enlarge, and a question's tokens can be followed through the layers. No dependencies.

const make = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
};

// Pictures

function enlargePictures() {
  const picture = make("img", { alt: "" });
  const title = make("strong");
  const scroll = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Enlarged picture" }, picture);
  const dialog = make("dialog", { "aria-label": "Enlarged picture" });
  const close = make("button", { type: "button", onclick: () => dialog.close() }, "Close");
  dialog.append(make("div", { class: "top" }, title, close), scroll);
  document.querySelector("main").append(dialog);
  for (const image of document.querySelectorAll("figure > img")) {
    const name = image.dataset.title;
    const button = make("button", { type: "button", class: "enlarge", "aria-label": `Enlarge: ${name}. ${image.alt}` });
    image.replaceWith(button);
    button.append(image);
    button.addEventListener("click", () => {
      picture.src = image.src;
      picture.alt = image.alt;
      picture.className = image.className;
      title.textContent = name;
      dialog.showModal();
    });
  }
}

// Routing of one question

const STOPS = ["#3b76c4", "#8fb4e3", "#eef0f2", "#f2a58a", "#d8432e"].map((hex) =>
  [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const EVIDENCE = "#00a37a";

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const at = Math.min(Math.floor(place), STOPS.length - 2);
  const mixed = STOPS[at].map((low, i) => Math.round(low + (place - at) * (STOPS[at + 1][i] - low)));
  return `rgb(${mixed.join(" ")})`;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const whole = new DataView(await new Response(stream).arrayBuffer());
  return Uint16Array.from({ length: whole.byteLength / 2 }, (_, i) => whole.getUint16(2 * i, true));
}

class Routing { // of one question: what explorer.figures wrote
  constructor(figures, layers, tokens, { units, dropped }) {
    Object.assign(this, { figures, layers, tokens, units, dropped });
    this.begins = [];
    let at = 4 * layers * tokens;
    for (let i = 0; i < layers * tokens; i++) {
      this.begins.push(at);
      at += 2 * figures[layers * tokens + i];
    }
  }
  part(number, layer, token) { return this.figures[(number * this.layers + layer) * this.tokens + token]; }
  importance(layer, token) { return this.part(0, layer, token) / this.units; }
  real(layer, token) { return this.part(1, layer, token); }
  virtual(layer, token) { return this.part(2, layer, token); }
  virtualWeight(layer, token) { return this.part(3, layer, token) / this.units; }
  experts(layer, token) { // heaviest first
    const begin = this.begins[layer * this.tokens + token];
    return Array.from({ length: this.real(layer, token) }, (_, i) => {
      const marked = this.figures[begin + 2 * i];
      return { expert: marked % this.dropped, dropped: marked >= this.dropped,
        weight: this.figures[begin + 2 * i + 1] / this.units };
    });
  }
  goesTo(layer, token, expert) { return this.experts(layer, token).some((one) => one.expert === expert && !one.dropped); }
  value(what, layer, token) { // layer null: the mean of all
    if (layer !== null) return what === "real" ? this.real(layer, token) : this.importance(layer, token);
    let sum = 0;
    for (let l = 0; l < this.layers; l++) sum += this.value(what, l, token);
    return sum / this.layers;
  }
}

function quantile(sorted, share) { return sorted[Math.round(share * (sorted.length - 1))]; }

class Follow {
  constructor(holder, data) {
    this.data = data;
    this.state = { question: 0, layer: null, what: data.importance ? "importance" : "real", expert: null, token: 1 };
    this.controls(holder);
    this.show();
    let width = window.innerWidth;
    window.addEventListener("resize", () => {
      if (window.innerWidth !== width) { width = window.innerWidth; this.paint(); }
    });
  }

  controls(holder) {
    const { data, state } = this;
    const field = (label, control, id) => {
      control.id = `follow-${id}`;
      return make("div", {}, make("label", { for: control.id }, label), control);
    };
    const listen = (name, read) => make("select", { onchange: (event) => {
      state[name] = read(event.target.value);
      if (name === "question") this.show(); else this.refresh();
    } });
    const number = (text) => text === "" ? null : Number(text);
    this.question = listen("question", Number);
    for (const domain of new Set(data.questions.map((one) => one.domain))) {
      const group = make("optgroup", { label: domain });
      data.questions.forEach((one, i) => {
        if (one.domain === domain) group.append(make("option", { value: i }, `${domain} ${one.number}: ${one.question || one.answer}`));
      });
      this.question.append(group);
    }
    this.layer = listen("layer", number);
    this.layer.append(make("option", { value: "" }, "mean of all layers"));
    for (let l = 0; l < data.layers; l++) this.layer.append(make("option", { value: l }, `MoE layer ${l}`));
    this.what = listen("what", String);
    if (data.importance) this.what.append(make("option", { value: "importance" }, "importance"));
    this.what.append(make("option", { value: "real" }, "real experts per token"));
    this.expert = listen("expert", number);
    this.about = make("dl");
    this.key = make("div", { class: "key" });
    this.sequence = make("div", { class: "sequence" });
    this.slider = make("input", { type: "range", min: 0, oninput: () => this.choose(Number(this.slider.value)) });
    const step = (by, label) => make("button", { type: "button", "aria-label": label,
      onclick: () => this.choose(state.token + by) }, by < 0 ? "◀" : "▶");
    const place = field("", this.slider, "token");
    this.place = place.querySelector("label");
    this.detail = make("div");
    holder.append(
      make("div", { class: "pick" }, field("Question", this.question, "question"), field("Layer", this.layer, "layer"),
        field("Colour", this.what, "what"), field("Underline the tokens of", this.expert, "expert")),
      this.about, this.key, this.sequence,
      make("div", { class: "step" }, step(-1, "Token before"), place, step(1, "Next token")),
      this.detail);
  }

  async show() {
    const { data, state } = this;
    this.one = data.questions[state.question];
    const tokens = this.one.tokens.length;
    const figures = await unpack(this.one.figures);
    this.routing = new Routing(figures, data.layers, tokens, data);
    this.evidence = new Set(this.one.evidence);
    this.pictures = await Promise.all(this.one.blocks.map(async (block) => {
      if (!block.png) return null;
      const image = make("img", { alt: "" });
      image.src = `data:image/png;base64,${block.png}`;
      await image.decode();
      return image;
    }));
    this.slider.max = tokens - 1;
    state.token = this.one.evidence.length ? this.one.evidence[0] : Math.min(state.token, tokens - 1);
    const said = this.one.said === null ? [] : [["model's answer", this.one.said || "(nothing)"]];
    const rows = [["question", this.one.question], ["right answer", this.one.answer], ...said].filter(([, text]) => text);
    this.about.replaceChildren(...rows.flatMap(([name, text]) => [make("dt", {}, name), make("dd", {}, text)]));
    this.refresh();
  }

  refresh() {
    const { data, state, routing } = this;
    const tokens = this.one.tokens.length;
    const none = make("option", { value: "" }, state.layer === null ? "no expert: pick a layer" : "no expert");
    this.expert.replaceChildren(none);
    this.expert.disabled = state.layer === null;
    if (state.layer === null) state.expert = null;
    else for (let e = 0; e < data.experts; e++) {
      let count = 0;
      for (let t = 0; t < tokens; t++) count += routing.goesTo(state.layer, t, e);
      this.expert.append(make("option", { value: e }, `expert ${e}: ${count} of ${tokens} tokens`));
    }
    this.expert.value = state.expert === null ? "" : state.expert;
    this.layer.value = state.layer === null ? "" : state.layer;
    this.values = Array.from({ length: tokens }, (_, t) => routing.value(state.what, state.layer, t));
    const sorted = [...this.values].sort((a, b) => a - b);
    let [low, high] = state.what === "real" ? [sorted[0], sorted[tokens - 1]] : [quantile(sorted, 0.02), quantile(sorted, 0.98)];
    const least = state.what === "real" ? 1 : 0.02; // noise is not to look like signal
    if (high - low < least) [low, high] = [(low + high - least) / 2, (low + high + least) / 2];
    this.scale = { low, high };
    const digits = state.what === "real" ? 1 : 2;
    const unit = state.what === "real" ? "real experts per token" : "importance, 0 to 1";
    this.key.replaceChildren(
      make("span", { class: "scale" }, low.toFixed(digits), make("span", { class: "ramp" }), `${high.toFixed(digits)} ${unit}`),
      ...(this.evidence.size ? [make("span", { class: "scale" }, make("span", { class: "outline" }), "carries the answer")] : []));
    this.paint();
    this.choose(state.token);
  }

  colourOf(token) { return colour((this.values[token] - this.scale.low) / (this.scale.high - this.scale.low)); }

  isHit(token) { return this.state.expert !== null && this.routing.goesTo(this.state.layer, token, this.state.expert); }

  paint() {
    if (!this.values) return;
    this.spans = new Map();
    this.painters = [];
    const parts = this.one.blocks.flatMap((block, i) => {
      const length = block.stop - block.start;
      if (block.kind === "text") {
        const title = block.learned ? "answer: the model learns to write these tokens" : "text that the model reads";
        return [make("p", {}, title), this.text(block)];
      }
      if (block.kind === "audio") {
        const each = `${length} tokens of ${Math.round(1000 * block.seconds)} ms`;
        return [make("p", {}, `sound: ${each}; bars are tall where the colour is red`), this.sound(block, this.pictures[i])];
      }
      const many = block.frames > 1 ? `${block.frames} frames of ` : "";
      return [make("p", {}, `${block.kind}: ${many}${block.rows} × ${block.columns} patches, a token each`),
        this.frames(block, this.pictures[i])];
    });
    this.sequence.replaceChildren(...parts);
    this.painters.forEach((paint) => paint());
  }

  text(block) {
    const line = make("div", { class: "tokens" });
    for (let t = block.start; t < block.stop; t++) {
      const piece = this.one.tokens[t];
      const special = /^<.+>$/.test(piece);
      const shown = piece.replace(/\n/g, "⏎").replace(/[\p{Cc}\p{Cf}]/gu, "·") || "·";
      const span = make("span", { class: special ? "special" : "", onclick: () => this.choose(t) }, shown);
      span.style.background = this.colourOf(t);
      span.classList.toggle("evidence", this.evidence.has(t));
      span.classList.toggle("hit", this.isHit(t));
      this.spans.set(t, span);
      line.append(span);
    }
    return line;
  }

  canvas(width, height, label, draw, pick) {
    const ratio = Math.min(window.devicePixelRatio || 1, 2);
    const canvas = make("canvas", { width: width * ratio, height: height * ratio, role: "img", "aria-label": label });
    canvas.style.width = `${width}px`;
    canvas.addEventListener("click", (event) => {
      const box = canvas.getBoundingClientRect();
      const token = pick((event.clientX - box.left) * width / box.width, (event.clientY - box.top) * height / box.height);
      if (token !== null) this.choose(token);
    });
    const context = canvas.getContext("2d");
    this.painters.push(() => {
      context.setTransform(ratio, 0, 0, ratio, 0, 0);
      context.clearRect(0, 0, width, height);
      context.imageSmoothingEnabled = false;
      draw(context);
    });
    return canvas;
  }

  mark(context, token, x, y, width, height) { // evidence, the expert's tokens, the chosen token
    if (this.evidence.has(token)) {
      context.strokeStyle = EVIDENCE; context.lineWidth = 2;
      context.strokeRect(x + 1, y + 1, width - 2, height - 2);
    }
    if (this.isHit(token)) { context.fillStyle = "#000"; context.fillRect(x + width / 2 - 3, y + height / 2 - 3, 6, 6); }
    if (token === this.state.token) {
      context.strokeStyle = "#fff"; context.lineWidth = 5; context.strokeRect(x + 2, y + 2, width - 4, height - 4);
      context.strokeStyle = "#000"; context.lineWidth = 3; context.strokeRect(x + 2, y + 2, width - 4, height - 4);
    }
  }

  frames(block, image) {
    const { rows, columns, frames } = block;
    const room = frames > 1 ? 150 : Math.min(260, this.sequence.clientWidth - 16);
    const side = Math.max(6, Math.floor(room / Math.max(rows, columns)));
    const width = side * columns, height = side * rows;
    const frameWidth = image.width / frames;
    const media = make("div", { class: "media" });
    const figure = (canvas, caption) => media.append(make("figure", {}, canvas, make("figcaption", {}, caption)));
    for (let f = 0; f < frames; f++) {
      const first = block.start + f * rows * columns;
      const place = (x, y) => first + Math.min(rows - 1, Math.floor(y / side)) * columns + Math.min(columns - 1, Math.floor(x / side));
      const draw = (context) => context.drawImage(image, f * frameWidth, 0, frameWidth, image.height, 0, 0, width, height);
      const name = frames > 1 ? `Frame ${f}` : "Picture";
      if (frames === 1) figure(this.canvas(width, height, "The picture as the model sees it", draw, place), "picture");
      figure(this.canvas(width, height, `${name}: each patch in the colour of its token`, (context) => {
        context.filter = "grayscale(1)";
        draw(context);
        context.filter = "none";
        for (let t = first; t < first + rows * columns; t++) {
          const [x, y] = [(t - first) % columns * side, Math.floor((t - first) / columns) * side];
          context.globalAlpha = 0.6; context.fillStyle = this.colourOf(t); context.fillRect(x, y, side, side);
          context.globalAlpha = 1;
        }
        for (let t = first; t < first + rows * columns; t++) {
          this.mark(context, t, (t - first) % columns * side, Math.floor((t - first) / columns) * side, side, side);
        }
      }, place), frames > 1 ? `frame ${f}` : "patches");
    }
    return media;
  }

  sound(block, image) {
    const count = block.stop - block.start;
    const [left, bars, picture, axis] = [34, 60, 90, 18];
    const width = Math.min(this.sequence.clientWidth - 16, 700);
    const step = (width - left) / count;
    const ink = getComputedStyle(document.body).color;
    const label = `Sound of ${(count * block.seconds).toFixed(2)} seconds: a bar per token over the spectrogram`;
    const pick = (x) => x < left ? null : block.start + Math.min(count - 1, Math.floor((x - left) / step));
    return make("div", { class: "media" }, this.canvas(width, bars + picture + axis, label, (context) => {
      const { low, high } = this.scale;
      context.font = "11px system-ui, sans-serif"; context.fillStyle = ink; context.textAlign = "right";
      const digits = this.state.what === "real" ? 1 : 2;
      context.fillText(high.toFixed(digits), left - 4, 10);
      context.fillText(low.toFixed(digits), left - 4, bars - 2);
      context.fillText("7.6", left - 4, bars + 12);
      context.fillText("kHz", left - 4, bars + 26);
      context.fillText("0.06", left - 4, bars + picture - 2);
      context.drawImage(image, left, bars + 3, width - left, picture - 3);
      for (let t = block.start; t < block.stop; t++) {
        const x = left + (t - block.start) * step;
        const share = Math.min(Math.max((this.values[t] - low) / (high - low), 0.03), 1);
        context.fillStyle = this.colourOf(t);
        context.fillRect(x + 0.5, bars - share * (bars - 4), step - 1, share * (bars - 4));
        context.globalAlpha = 0.42; context.fillRect(x, bars + 3, step, picture - 3); context.globalAlpha = 1;
        this.mark(context, t, x, bars + 3, step, picture - 3);
      }
      context.fillStyle = ink; context.textAlign = "center";
      const seconds = count * block.seconds;
      const ticks = seconds > 4 ? 1 : seconds > 1.5 ? 0.5 : 0.2;
      for (let s = 0; s < seconds - ticks / 2; s += ticks) {
        context.fillText(s === 0 ? "0 s" : s.toFixed(1), left + Math.max(8, s / block.seconds * step), bars + picture + 13);
      }
    }, pick));
  }

  placeOf(token) {
    const block = this.one.blocks.find((one) => one.start <= token && token < one.stop);
    const at = token - block.start;
    if (block.kind === "text") return `text “${this.one.tokens[token].replace(/\n/g, "⏎")}”${block.learned ? ", answer" : ""}`;
    if (block.kind === "audio") return `sound, ${(at * block.seconds).toFixed(2)} to ${((at + 1) * block.seconds).toFixed(2)} s`;
    const inFrame = at % (block.rows * block.columns);
    const frame = block.frames > 1 ? `frame ${Math.floor(at / (block.rows * block.columns))}, ` : "";
    return `${block.kind} patch, ${frame}row ${Math.floor(inFrame / block.columns)}, column ${inFrame % block.columns}`;
  }

  choose(token) {
    const { state, data } = this;
    this.spans.get(state.token)?.classList.remove("chosen");
    state.token = Math.min(Math.max(token, 0), this.one.tokens.length - 1);
    this.spans.get(state.token)?.classList.add("chosen");
    this.painters.forEach((paint) => paint());
    const place = this.placeOf(state.token) + (this.evidence.has(state.token) ? ", carries the answer" : "");
    this.slider.value = state.token;
    this.slider.setAttribute("aria-valuetext", place);
    this.place.textContent = `Token ${state.token} of ${this.one.tokens.length}: ${place}`;
    const rows = Array.from({ length: data.layers }, (_, l) => this.layerRow(l));
    const columns = ["layer", ...(data.importance ? ["importance"] : []), "experts, with the weight of each"];
    this.detail.replaceChildren(
      make("table", {}, make("thead", {}, make("tr", {}, ...columns.map((name) => make("th", { scope: "col" }, name)))),
        make("tbody", {}, ...rows)));
  }

  layerRow(layer) {
    const { state, data, routing } = this;
    const virtual = routing.virtual(layer, state.token);
    const chips = routing.experts(layer, state.token).map(({ expert, weight, dropped }) => {
      const name = `${expert} · ${weight.toFixed(2)}${dropped ? " · no room" : ""}`;
      const pressed = state.layer === layer && state.expert === expert;
      return make("button", { type: "button", "aria-pressed": pressed ? "true" : "false",
        "aria-label": `Layer ${layer}, expert ${name}: underline its tokens`, onclick: () => {
          Object.assign(state, pressed ? { expert: null } : { layer, expert });
          this.refresh();
          this.detail.querySelectorAll("tbody tr")[layer].querySelector("button[aria-pressed=true], button")?.focus();
        } }, name);
    });
    const rest = virtual ? `+ ${virtual} virtual, weight ${routing.virtualWeight(layer, state.token).toFixed(2)}` : "";
    return make("tr", { class: state.layer === layer ? "current" : "" }, make("th", { scope: "row" }, String(layer)),
      ...(data.importance ? [make("td", {}, routing.importance(layer, state.token).toFixed(2))] : []),
      make("td", {}, make("div", { class: "chips" }, ...chips, ...(rest ? [make("span", { class: "virtual" }, rest)] : []))));
  }
}

enlargePictures();
const holder = document.getElementById("follow-here");
if (holder) {
  if (typeof DecompressionStream === "undefined") holder.textContent = "This browser is too old to show the routing; one of 2023 or later does.";
  else {
    holder.textContent = "";
    new Follow(holder, JSON.parse(document.getElementById("follow-data").textContent));
  }
}
