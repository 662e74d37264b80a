// The charts of a report. All of them show the same part of the x axis; values that a run does not have are null.
"use strict";
(() => {
  const { runs, charts } = JSON.parse(document.getElementById("data").textContent);
  const section = document.getElementById("curves");
  if (!section) return;
  const SVG = "http://www.w3.org/2000/svg";
  const HEIGHT = 260, LEFT = 58, RIGHT = 10, TOP = 8, BOTTOM = 24, DASHES = ["", "7 4", "2 3"];
  const view = { axis: "epoch", from: null, to: null, smooth: 0, log: false, hidden: new Set() };
  const number = (value) => (value === null ? "-" : String(Number(value.toPrecision(5))));
  const colour = (index) => `var(--c${index % 10})`;
  const dash = (index) => DASHES[Math.floor(index / 10) % DASHES.length];

  // What tells the runs apart: their names without the folders that all of them begin and end with.
  const labels = (() => {
    const parts = runs.map((run) => run.name.split("/"));
    const alike = (at) => parts.every((part) => part.length > 1 && part.at(at) === parts[0].at(at));
    while (alike(0)) parts.forEach((part) => part.shift());
    while (alike(-1)) parts.forEach((part) => part.pop());
    const names = parts.map((part) => part.join("/"));
    const short = names.map((name) => (name.length > 32 ? `\u2026${name.slice(-31)}` : name));
    return new Set(short).size === names.length ? short : names;
  })();

  const make = (name, attributes, parent) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  };

  // Index of the first value of a sorted array that is not below x.
  const lower = (sorted, x) => {
    let low = 0, high = sorted.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sorted[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low;
  };

  const nearest = (sorted, x) => {
    const index = lower(sorted, x);
    if (index === 0) return 0;
    return index === sorted.length || x - sorted[index - 1] < sorted[index] - x ? index - 1 : index;
  };

  // Exponential mean, corrected at its beginning as Adam's are; 0 = the values themselves.
  const smoothed = (values, weight) => {
    if (!weight) return values;
    let mean = 0, kept = 1;
    return values.map((value) => {
      if (value === null) return null;
      mean = weight * mean + (1 - weight) * value;
      kept *= weight;
      return mean / (1 - kept);
    });
  };

  const ticks = (low, high, count) => {
    const rough = (high - low) / count || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((f) => f * power).find((s) => s >= rough * 0.999);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(i * step);
    return found;
  };

  const logTicks = (low, high) => {
    const found = [];
    for (let p = Math.floor(low); p <= high; p++)
      for (const f of high - low > 2 ? [1] : [1, 2, 5]) {
        const value = p + Math.log10(f);
        if (value >= low && value <= high) found.push(value);
      }
    return found.length > 1 ? found : [low, (low + high) / 2, high];
  };

  const seriesOf = (metric) =>
    runs.flatMap((run, index) =>
      Object.entries(run.kinds)
        .filter(([, curves]) => metric in curves.values)
        .map(([kind, curves]) => ({ index, kind, curves, ...curves.values[metric] })));

  const xRange = () => {
    let low = Infinity, high = -Infinity;
    runs.forEach((run, index) => {
      if (view.hidden.has(index)) return;
      for (const curves of Object.values(run.kinds)) {
        const x = curves[view.axis];
        low = Math.min(low, x[0]);
        high = Math.max(high, x[x.length - 1]);
      }
    });
    if (low > high) [low, high] = [0, 1];
    low = view.from ?? low;
    high = view.to ?? high;
    return high > low ? [low, high] : [low - 0.5, low + 0.5];
  };

  class Chart {
    constructor(metric, parent) {
      this.metric = metric;
      this.series = seriesOf(metric);
      this.at = null;
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      caption.textContent = metric;
      this.svg = make("svg", { tabindex: 0, role: "img" }, figure);
      this.readout = document.createElement("div");
      this.readout.className = "values";
      figure.prepend(caption);
      figure.append(this.readout);
      parent.append(figure);
      this.listen();
    }

    draw() {
      const svg = this.svg, width = Math.max(this.svg.clientWidth, 200);
      svg.replaceChildren();
      svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
      [this.low, this.high] = xRange();
      this.shown = this.series.filter((s) => !view.hidden.has(s.index));
      for (const s of this.shown) {
        s.x = s.curves[view.axis];
        s.y = smoothed(s.mean, s.kind === "training" ? view.smooth : 0);
        s.first = Math.max(lower(s.x, this.low) - 1, 0);
        s.end = Math.min(lower(s.x, this.high) + 1, s.x.length);
      }
      const [bottom, top] = this.yRange();
      const flip = (value) => (view.log ? Math.log10(value) : value);
      this.px = (x) => LEFT + ((x - this.low) / (this.high - this.low)) * (width - LEFT - RIGHT);
      this.back = (p) => this.low + ((p - LEFT) / (width - LEFT - RIGHT)) * (this.high - this.low);
      const py = (y) => TOP + (1 - (flip(y) - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
      this.grid(width, bottom, top);
      const clip = `clip-${this.metric.replace(/\W/g, "_")}`;
      const frame = { x: LEFT, y: TOP, width: width - LEFT - RIGHT, height: HEIGHT - TOP - BOTTOM };
      make("rect", { ...frame, x: LEFT - 4, width: frame.width + 8 }, make("clipPath", { id: clip }, svg));
      const inside = make("g", { "clip-path": `url(#${clip})` }, svg);
      for (const s of this.shown) this.curve(s, py, inside);
      this.cursor = make("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" }, svg);
      this.dragged = make("rect", { ...frame, class: "drag", width: 0 }, svg);
      svg.setAttribute("aria-label", `${this.metric} by ${view.axis}. ` + this.shown.map((s) => {
        const last = s.y.findLast((y) => y !== null);
        return `${runs[s.index].name}, ${s.kind}: ${last === undefined ? "no values" : `last ${number(last)}`}`;
      }).join("; "));
      this.say();
    }

    usable(y) {
      return y !== null && y !== undefined && (!view.log || y > 0);
    }

    yRange() {
      let low = Infinity, high = -Infinity;
      for (const s of this.shown)
        for (let i = s.first; i < s.end; i++)
          for (const y of view.smooth || !s.low ? [s.y[i]] : [s.y[i], s.low[i], s.high[i]])
            if (this.usable(y)) {
              low = Math.min(low, y);
              high = Math.max(high, y);
            }
      if (low > high) return [0, 1];
      if (view.log) [low, high] = [Math.log10(low), Math.log10(high)];
      const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
      return [low - margin, high + margin];
    }

    grid(width, bottom, top) {
      const py = (y) => TOP + (1 - (y - bottom) / (top - bottom)) * (HEIGHT - TOP - BOTTOM);
      for (const y of view.log ? logTicks(bottom, top) : ticks(bottom, top, 5)) {
        make("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: py(y), y2: py(y) }, this.svg);
        const text = make("text", { x: LEFT - 6, y: py(y) + 4, "text-anchor": "end" }, this.svg);
        text.textContent = String(Number((view.log ? 10 ** y : y).toPrecision(view.log ? 3 : 6)));
      }
      for (const x of ticks(this.low, this.high, width / 90)) {
        const text = make("text", { x: this.px(x), y: HEIGHT - 6, "text-anchor": "middle" }, this.svg);
        text.textContent = String(Number(x.toPrecision(8)));
      }
    }

    curve(s, py, parent) {
      const line = [], upper = [], under = [], dots = s.kind === "validation" || s.end - s.first < 3;
      let pen = "M";
      for (let i = s.first; i < s.end; i++) {
        if (!this.usable(s.y[i])) {
          pen = "M";
          continue;
        }
        const x = this.px(s.x[i]).toFixed(1), y = py(s.y[i]).toFixed(1);
        line.push(`${pen}${x} ${y}`);
        pen = "L";
        if (s.low && this.usable(s.low[i])) {
          upper.push(`${x} ${py(s.high[i]).toFixed(1)}`);
          under.push(`${x} ${py(s.low[i]).toFixed(1)}`);
        }
        if (dots && s.end - s.first <= 200) make("circle", { cx: x, cy: y, r: 3, fill: colour(s.index) }, parent);
      }
      if (upper.length)
        make("path", { class: "band", d: `M${[...upper, ...under.reverse()].join("L")}Z`, style: `fill:${colour(s.index)}` }, parent);
      if (line.length)
        make("path", { d: line.join(""), style: `stroke:${colour(s.index)}`, "stroke-dasharray": dash(s.index) }, parent);
    }

    // Show the values at the cursor.
    say() {
      this.readout.replaceChildren();
      this.cursor.setAttribute("visibility", this.at === null ? "hidden" : "visible");
      if (this.at === null) return;
      this.cursor.setAttribute("x1", this.px(this.at));
      this.cursor.setAttribute("x2", this.px(this.at));
      const place = document.createElement("span");
      place.textContent = `${view.axis} ${number(this.at)}`;
      this.readout.append(place);
      for (const s of this.shown) {
        const i = nearest(s.x, this.at), item = document.createElement("span"), key = document.createElement("i");
        key.textContent = "\u25cf ";
        key.style.color = colour(s.index);
        const spread = s.low && s.low[i] !== null ? ` (${number(s.low[i])} to ${number(s.high[i])} of ${s.curves.of})` : "";
        const name = runs.length > 1 ? `${labels[s.index]} ` : "";
        item.append(key, `${name}${s.kind} ${number(s.y[i])}${spread} at ${number(s.x[i])}`);
        this.readout.append(item);
      }
    }

    move(at) {
      this.at = at === null ? null : Math.min(Math.max(at, this.low), this.high);
      this.say();
    }

    listen() {
      const svg = this.svg, place = (event) => event.clientX - svg.getBoundingClientRect().left;
      let start = null;
      svg.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        start = place(event);
        svg.setPointerCapture(event.pointerId);
      });
      svg.addEventListener("pointermove", (event) => {
        const now = place(event);
        this.move(this.back(now));
        if (start === null) return;
        this.dragged.setAttribute("x", Math.min(start, now));
        this.dragged.setAttribute("width", Math.abs(now - start));
      });
      svg.addEventListener("pointerup", (event) => {
        const [from, to] = [start, place(event)].map(this.back).sort((a, b) => a - b);
        const far = start !== null && Math.abs(place(event) - start) > 8;
        start = null;
        this.dragged.setAttribute("width", 0);
        if (far) zoom(Math.max(from, this.low), Math.min(to, this.high));
      });
      svg.addEventListener("pointercancel", () => {
        start = null;
        this.dragged.setAttribute("width", 0);
      });
      svg.addEventListener("pointerleave", () => start === null && this.move(null));
      svg.addEventListener("blur", () => this.move(null));
      svg.addEventListener("dblclick", () => zoom(null, null));
      svg.addEventListener("keydown", (event) => {
        const at = this.at ?? (this.low + this.high) / 2, span = this.high - this.low;
        const actions = {
          ArrowLeft: () => this.move(at - span / 50),
          ArrowRight: () => this.move(at + span / 50),
          "+": () => zoom(Math.max(at - span / 4, this.low), Math.min(at + span / 4, this.high)),
          "-": () => zoom(at - span, at + span),
          Escape: () => zoom(null, null),
        };
        if (!(event.key in actions) || event.ctrlKey || event.metaKey || event.altKey) return;
        event.preventDefault();
        this.readout.setAttribute("role", "status");
        actions[event.key]();
      });
    }
  }

  const field = (id) => document.getElementById(id);
  const made = [...section.querySelectorAll(".charts")].flatMap((box, i) => charts[i].map((name) => new Chart(name, box)));
  const draw = () => made.forEach((chart) => chart.draw());

  function zoom(from, to) {
    [view.from, view.to] = [from, to];
    field("from").value = from === null ? "" : number(from);
    field("to").value = to === null ? "" : number(to);
    draw();
  }

  for (const radio of section.querySelectorAll("[name=axis]"))
    radio.addEventListener("change", () => {
      view.axis = radio.value;
      zoom(null, null);
    });
  for (const id of ["from", "to"])
    field(id).addEventListener("change", () => {
      view[id] = field(id).value === "" ? null : Number(field(id).value);
      draw();
    });
  field("reset").addEventListener("click", () => zoom(null, null));
  field("smooth").addEventListener("input", () => {
    view.smooth = Number(field("smooth").value);
    draw();
  });
  field("log").addEventListener("change", () => {
    view.log = field("log").checked;
    draw();
  });
  runs.forEach((run, index) => {
    const label = document.createElement("label"), box = document.createElement("input"), key = document.createElement("span");
    box.type = "checkbox";
    box.checked = true;
    box.addEventListener("change", () => {
      view.hidden[box.checked ? "delete" : "add"](index);
      draw();
    });
    key.className = "key";
    key.style.borderTopColor = colour(index);
    key.style.borderTopStyle = dash(index) ? "dashed" : "solid";
    label.append(box, key, run.name);
    field("runs").append(label);
  });
  section.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  let width = 0;
  new ResizeObserver(() => {
    if (section.clientWidth !== width) {
      width = section.clientWidth;
      draw();
    }
  }).observe(section);
})();
