"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const isOne = runs.length === 1;
const byId = (id) => document.getElementById(id);
const isNumber = (value) => typeof value === "number" && isFinite(value);

// Elements. A string is always a text node: nothing here makes HTML of text.
function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children.flat(Infinity)) {
    if (child !== null && child !== undefined && child !== false) {
      node.append(child);
    }
  }
  return node;
}
const el = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag),
    attributes, children);

// Numbers as people read them.
function number(value) {
  if (!isNumber(value)) return "–";
  const size = Math.abs(value);
  if (size && (size < 1e-3 || size >= 1e7)) {
    return value.toExponential(1).replace("e+", "e").replace("-", "−")
      .replace("e-", "e−");
  }
  const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : 3;
  return value.toLocaleString("en-US", { maximumFractionDigits: digits })
    .replace("-", "−");
}
const percent = (value) => !isNumber(value) ? "–" :
  (100 * value).toLocaleString("en-US", {
    minimumFractionDigits: value > 0 && value < 1 ? 1 : 0,
    maximumFractionDigits: value && Math.abs(value) < 1e-3 ? 3 : 1 }) + " %";
function duration(seconds) {
  if (!isNumber(seconds)) return "–";
  if (seconds < 60) return number(Number(seconds.toPrecision(2))) + " s";
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return minutes + " min";
  const hours = Math.floor(minutes / 60);
  if (hours < 48) return hours + " h " + (minutes % 60) + " min";
  return Math.floor(hours / 24) + " d " + (hours % 24) + " h";
}
const forms = {
  number, log: number, percent,
  seconds: (value) => isNumber(value) ? number(value) + " s" : "–",
};
const colour = (index) => "var(--c" + (index % 12) + ")";
const plural = (count, word) =>
  count.toLocaleString("en-US") + " " + word + (count === 1 ? "" : "s");

// What a person has chosen outlives a reload of this page.
const key = "agrpo_jax.report/" + runs.map((run) => run.name).join();
let kept = {};
try { kept = JSON.parse(sessionStorage.getItem(key)) || {}; } catch (e) {}
function keep(changes) {
  Object.assign(kept, changes);
  try { sessionStorage.setItem(key, JSON.stringify(kept)); } catch (e) {}
}

// --- Tables, sorted by a click on a heading -------------------------------
// columns: {title, value: row -> to sort by, cell: row -> shown, number, key}
function table(columns, rows, options = {}) {
  const body = el("tbody");
  let order = null;
  function show() {
    const sorted = [...rows];
    if (order) {
      const { column, sign } = order;
      sorted.sort((a, b) => {
        const x = column.value(a), y = column.value(b);
        const isLast = (v) => v === null || v === undefined || v !== v;
        if (isLast(x) || isLast(y)) return isLast(x) - isLast(y);
        return sign * (typeof x === "string" || typeof y === "string" ?
          String(x).localeCompare(String(y), "en", { numeric: true }) : x - y);
      });
    }
    body.replaceChildren(...sorted.map((row) =>
      el("tr", { class: options.rowClass && options.rowClass(row) },
        columns.map((column) => el("td", {
          class: column.number ? "n" : column.key ? "key" : null,
        }, column.cell ? column.cell(row) : String(column.value(row)))))));
  }
  const heads = columns.map((column) => {
    const head = el("th", { scope: "col", "aria-sort": "none",
      class: column.number && "n" },
      el("button", { type: "button", onclick: () => {
        const isUp = head.getAttribute("aria-sort") !== "ascending";
        for (const other of heads) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
        order = { column, sign: isUp ? 1 : -1 };
        show();
      } }, column.title));
    return head;
  });
  show();
  const made = el("div", { class: "scroll card", id: options.id, tabindex: -1 },
    el("table", {}, el("thead", {}, el("tr", {}, heads)), body));
  made.setRows = (more) => { rows = more; show(); };
  return made;
}

// --- Overview ---------------------------------------------------------------
function ends(run, name) {
  const found = run.series[name];
  if (!found) return [null, null];
  const ys = found[1].filter(isNumber);
  return [ys[0], ys[ys.length - 1]];
}
const median = (values) => {
  const sorted = values.filter(isNumber).sort((a, b) => a - b);
  return sorted.length ? sorted[Math.floor(sorted.length / 2)] : null;
};
const typical = (run, name) =>
  run.series[name] ? median(run.series[name][1].slice(-60)) : null;
function accuracyBefore(run) {
  const first = run.evaluations[0];
  return run.evaluations.length > 1 && first.step === 0 ? first.accuracy : null;
}
function interval(run) {
  const last = run.evaluations[run.evaluations.length - 1];
  return last && isNumber(last.accuracy_low) ?
    percent(last.accuracy_low) + " to " + percent(last.accuracy_high) : null;
}
const costText = (hours, price) => !isNumber(hours) ? "not known" :
  number(hours) + " chip hours" +
  (price ? " · " + number(hours * price) : "");

function tile(label, value, more, from) {
  return el("div", { class: "card tile" },
    el("div", { class: "label" }, label),
    el("div", { class: "value" },
      from && el("span", { class: "from" }, from + " → "), value),
    more && el("div", { class: "more" }, more));
}

function tiles(run) {
  const lastAccuracy = ends(run, "eval/accuracy")[1];
  const [firstReward, lastReward] = ends(run, "reward");
  const [firstLoss, lastLoss] = ends(run, "loss");
  const cost = run.cost;
  const mfu = typical(run, "mfu");
  const flops = typical(run, "model_tflops_per_second");
  const tokens = typical(run, "tokens_per_second");
  const wholeHours = isNumber(cost.chip_hours) &&
    isNumber(cost.chip_hours_left) ? cost.chip_hours + cost.chip_hours_left :
    null;
  const made = [];
  if (isNumber(lastAccuracy)) {
    const before = isNumber(accuracyBefore(run)) ?
      percent(accuracyBefore(run)).replace(" %", "") : null;
    made.push(tile("Held-out accuracy", percent(lastAccuracy),
      interval(run) && "95 %: " + interval(run), before));
  }
  if (isNumber(lastReward)) {
    made.push(tile("Reward", number(lastReward), "first → last train step",
      number(firstReward)));
  } else if (isNumber(lastLoss)) {
    made.push(tile("Loss", number(lastLoss), "first → last train step",
      number(firstLoss)));
  }
  made.push(tile("Train steps", run.done.toLocaleString("en-US"),
    (run.finished ? "all, " : "of " + run.steps.toLocaleString("en-US") +
      ", ") + "in " + duration(cost.seconds) +
    (!run.finished && isNumber(cost.seconds_left) ?
      ", " + duration(cost.seconds_left) + " to go" : "")));
  if (tokens) {
    made.push(tile("Tokens per second", number(tokens), "of completions, median"));
  }
  if (isNumber(mfu)) {
    made.push(tile("MFU", percent(mfu), "model FLOP/s of the peak, median"));
  } else if (isNumber(flops)) {
    made.push(tile("Model TFLOP/s", number(flops),
      "no MFU: peak not known"));
  }
  made.push(tile("Cost", isNumber(cost.chip_hours) ?
    (cost.price ? number(cost.chip_hours * cost.price) :
      number(cost.chip_hours)) : "–",
    !isNumber(cost.chip_hours) ?
      (isNumber(cost.seconds) ? "hardware" : "time") + " not recorded" :
      (cost.price ? number(cost.chip_hours) + " chip hours" : "chip hours; no price given") +
      (!run.finished && isNumber(wholeHours) ? ", " +
        (cost.price ? number(wholeHours * cost.price) : number(wholeHours)) +
        " at the end" : "")));
  return el("div", { class: "tiles" }, made);
}

// One entry per rule, with what it found in each run.
function warningList() {
  const rules = new Map();
  for (const run of runs) {
    for (const one of run.warnings) {
      if (!rules.has(one.name)) rules.set(one.name, { ...one, found: [] });
      rules.get(one.name).found.push(
        isOne ? one.words : run.name + ": " + one.words);
    }
  }
  return [...rules.values()].sort((a, b) =>
    (b.level === "stop") - (a.level === "stop")).map((one) =>
    el("li", { class: "warning " + one.level, "data-rule": one.name },
      el("span", { class: "sign", "aria-hidden": "true" },
        one.level === "stop" ? "✕" : "!"),
      el("div", {}, one.found.map((words) => el("p", {}, words)),
        el("p", { class: "remedy" }, one.remedy))));
}

function runTable() {
  const rows = runs.map((run, index) => ({ run, index }));
  const column = (title, value, show) => runs.some((run) =>
    isNumber(value(run))) && {
    title, value: (row) => value(row.run), number: true,
    cell: (row) => show(value(row.run)),
  };
  return table([
    { title: "Run", value: (row) => row.run.name, cell: (row) =>
      el("span", { class: "name" }, el("span", { class: "swatch",
        "--c": colour(row.index) }), row.run.name) },
    column("Held-out accuracy", (run) => ends(run, "eval/accuracy")[1], percent),
    column("Before", accuracyBefore, percent),
    column("Reward", (run) => ends(run, "reward")[1], number),
    column("Train steps", (run) => run.done, number),
    column("Time", (run) => run.cost.seconds, duration),
    column("Tokens/s", (run) => typical(run, "tokens_per_second"), number),
    column("MFU", (run) => typical(run, "mfu"), percent),
    column("Chip hours", (run) => run.cost.chip_hours, number),
    column("Cost", (run) => run.cost.price && isNumber(run.cost.chip_hours) ?
      run.cost.price * run.cost.chip_hours : null, number),
  ].filter(Boolean), rows, { id: "runs" });
}

function overview() {
  const warned = warningList();
  const section = byId("overview");
  const live = el("span", { class: "pill", id: "live" },
    "being written: reads itself again");
  const status = isOne ?
    (runs[0].finished ? "The run is done" :
      (runs[0].stopped ? "Stopped after train step " : "Train step ") +
      runs[0].done + " of " + runs[0].steps) :
    plural(runs.length, "run") + " side by side";
  section.append(
    el("p", { class: "status" }, data.seconds > 0 && live, status + ", as of " +
      data.written + " UTC.", !warned.length && " No warnings."),
    isOne ? "" : runTable(),
    warned.length ? el("ul", { class: "warnings", "aria-label": "Warnings" },
      warned) : "",
    isOne ? tiles(runs[0]) : "");
  const missing = runs.flatMap((run) => run.missing.map((words) =>
    isOne ? words : run.name + ": " + words));
  if (missing.length) {
    section.append(el("p", { class: "note absent" }, missing.join(" ")));
  }
}

// --- Curves -----------------------------------------------------------------
const charts = [];  // with show(cursor), which redraws one
const left = 46, rightSide = 8, topSide = 8, bottom = 20;
let cursor = null;
const lastStep = Math.max(1, ...runs.map((run) => run.done));
const firstStep = 0;
let isSmooth = kept.smooth !== false;

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = Math.pow(10, Math.floor(Math.log10(rough)));
  const step = power * [1, 2, 2.5, 5, 10].find((one) => one * power >= rough);
  const found = [];
  for (let value = Math.ceil(low / step - 1e-9) * step;
    value <= high + step * 1e-9; value += step) {
    found.push(Math.abs(value) < step * 1e-9 ? 0 : value);
  }
  return found;
}

// A running mean over a twentieth of the points, centred; none of a series that
// is smooth already.
function smooth(ys) {
  const known = ys.filter(isNumber);
  const travel = known.slice(1).reduce((sum, y, i) =>
    sum + Math.abs(y - known[i]), 0);
  if (travel <= 3 * (Math.max(...known) - Math.min(...known))) return null;
  const reach = Math.max(1, Math.round(ys.length / 40));
  return ys.map((y, index) => {
    if (!isNumber(y)) return null;
    const near = ys.slice(Math.max(0, index - reach), index + reach + 1)
      .filter(isNumber);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

function path(points) {
  let text = "", isOpen = false;
  for (const [x, y] of points) {
    if (!isNumber(y)) { isOpen = false; continue; }
    text += (isOpen ? "L" : "M") + x.toFixed(1) + " " + y.toFixed(1);
    isOpen = true;
  }
  return text;
}

function nearest(xs, step) {
  let low = 0, high = xs.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (xs[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - xs[low - 1] <= xs[low] - step ? low - 1 : low;
}

// The parts that all charts share: axes, cursor, keyboard.
function frame(title, note, describe, draw, read, size, resting = "") {
  const where = el("span", { class: "where" });
  const readout = el("div", { class: "readout", "aria-live": "off" });
  const picture = svg("svg", { tabindex: 0, role: "img",
    "aria-label": title + ". " + describe + " Arrow keys read values." });
  const figure = el("figure", { class: "card chart " + (size || "") },
    el("div", { class: "title" }, el("figcaption", {}, title), where),
    note && el("div", { class: "what" }, note), readout, picture);
  const one = { figure, picture, cursorLine: null };
  one.x = (step) => left + (one.width - left - rightSide) *
    (step - firstStep) / Math.max(1, lastStep - firstStep);
  one.draw = () => {
    one.width = Math.max(220, picture.clientWidth || 340);
    one.height = picture.clientHeight || 170;
    picture.setAttribute("viewBox", "0 0 " + one.width + " " + one.height);
    picture.replaceChildren();
    draw(one);
    for (const step of ticks(firstStep, lastStep, one.width > 600 ? 8 : 4)) {
      if (step % 1) continue;
      picture.append(svg("text", { x: one.x(step), y: one.height - 4,
        "text-anchor": step === firstStep ? "start" : "middle" },
        step.toLocaleString("en-US")));
    }
    one.cursorLine = svg("line", { class: "cursor", y1: topSide,
      y2: one.height - bottom, visibility: "hidden" });
    picture.append(one.cursorLine);
    one.show();
  };
  one.show = () => {
    readout.replaceChildren(...read(cursor));
    where.textContent = cursor === null ? resting : "step " +
      cursor.toLocaleString("en-US");
    if (one.cursorLine && cursor !== null) {
      one.cursorLine.setAttribute("x1", one.x(cursor));
      one.cursorLine.setAttribute("x2", one.x(cursor));
    }
    if (one.cursorLine) {
      one.cursorLine.setAttribute("visibility",
        cursor === null ? "hidden" : "visible");
    }
  };
  const point = (event) => {
    const box = picture.getBoundingClientRect();
    const share = (event.clientX - box.left - left) /
      (box.width - left - rightSide);
    moveTo(firstStep + share * (lastStep - firstStep));
  };
  picture.addEventListener("pointermove", point);
  picture.addEventListener("pointerdown", point);
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse" && document.activeElement !== picture) {
      moveTo(null);
    }
  });
  picture.addEventListener("focus", () =>
    readout.setAttribute("aria-live", "polite"));
  picture.addEventListener("blur", () => {
    readout.setAttribute("aria-live", "off");
    moveTo(null);
  });
  picture.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round((lastStep - firstStep) / 50)) *
      (event.shiftKey ? 5 : 1);
    const now = cursor === null ? lastStep : cursor;
    const to = { ArrowLeft: now - far, ArrowRight: now + far,
      Home: firstStep, End: lastStep, Escape: null };
    if (event.key in to) {
      event.preventDefault();
      event.stopPropagation();
      moveTo(to[event.key]);
    }
  });
  charts.push(one);
  return one;
}

function moveTo(step) {
  cursor = step === null ? null :
    Math.round(Math.min(lastStep, Math.max(firstStep, step)));
  for (const one of charts) one.show();
}

function scale(one, low, high, isLog) {
  const height = one.height - topSide - bottom;
  if (isLog) {
    const [a, b] = [Math.log10(low), Math.log10(high)];
    return (y) => !(y > 0) ? one.height - bottom :
      topSide + height * (1 - (Math.log10(y) - a) / (b - a));
  }
  return (y) => topSide + height * (1 - (y - low) / (high - low));
}

function axis(one, y, values, show) {
  for (const value of values) {
    const label = svg("text", { x: left - 6, y: y(value) + 4,
      "text-anchor": "end" }, show(value));
    one.picture.append(
      svg("line", { class: "grid-line", x1: left, x2: one.width - rightSide,
        y1: y(value), y2: y(value) }), label);
    // Many digits stand closer together; the card's edge would cut them.
    if (label.getComputedTextLength() > left) {
      fill(label, { textLength: left, lengthAdjust: "spacingAndGlyphs" }, []);
    }
  }
}

// Of a tick, which is a round number: all of its digits, as fewer might be
// those of its neighbour too. What adding up has left in the last is none.
const short = (value) => {
  const size = Math.abs(value);
  const [unit, sign] = size >= 1e6 ? [1e6, "M"] : size >= 1e4 ? [1e3, "k"] :
    [1, ""];
  const exact = Number((value / unit).toPrecision(12));
  const text = size && size < 1e-2 ? exact.toExponential() : String(exact);
  return (text + sign).replaceAll("-", "−");
};

function lineChart(chart) {
  const isLog = chart.form === "log";
  const names = Object.keys(chart.lines);
  const lines = [];
  runs.forEach((run, index) => names.forEach((name, rank) => {
    if (!run.series[name]) return;
    const [xs, ys] = run.series[name];
    const isMany = xs.length > 40 && name !== "eval/accuracy";
    lines.push({
      run, name, xs, ys, mean: isMany ? smooth(ys) : null,
      label: chart.lines[name],
      colour: isOne ? colour(rank) : colour(index),
      isDashed: !isOne && rank > 0,
      isSecond: rank > 0,
      evaluations: name === "eval/accuracy" ? run.evaluations : null,
    });
  }));
  if (!lines.length) return null;
  const bounds = (one) => one.evaluations ? one.evaluations.flatMap((e) =>
    [e.accuracy_low, e.accuracy_high, e.accuracy]) : [];
  const all = lines.flatMap((one) => one.ys.concat(bounds(one)))
    .filter((y) => isNumber(y) && (!isLog || y > 0));
  let low = all.reduce((a, b) => Math.min(a, b), Infinity);
  let high = all.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!all.length) [low, high] = isLog ? [1e-3, 1] : [0, 1];
  if (isLog) {
    low = Math.pow(10, Math.floor(Math.log10(low)));
    high = Math.pow(10, Math.ceil(Math.log10(high)));
    if (low === high) high *= 10;
  } else {
    if (low >= 0 && (chart.form === "percent" || low < 0.35 * high)) low = 0;
    if (low === high) [low, high] = low ? [low - Math.abs(low) / 2,
      high + Math.abs(high) / 2] : [0, chart.form === "percent" ? 0.1 : 1];
    const step = ticks(low, high, 4);
    const size = step.length > 1 ? step[1] - step[0] : high - low;
    low = Math.floor(low / size + 1e-9) * size;
    high = Math.ceil(high / size - 1e-9) * size;
    if (chart.form === "percent" && all.every((y) => y <= 1)) {
      high = Math.min(1, high);
    }
  }
  const show = forms[chart.form];
  const draw = (one) => {
    const y = scale(one, low, high, isLog);
    const marks = isLog ? Array.from(
      { length: Math.round(Math.log10(high / low)) + 1 },
      (_, i) => low * Math.pow(10, i)).filter((_, i, every) =>
        i % Math.ceil(every.length / 5) === 0) : ticks(low, high, 4);
    axis(one, y, marks, chart.form === "percent" ?
      (value) => short(100 * value) + "%" : isLog ? (value) =>
        value.toExponential(0).replace("e+", "e").replace("-", "−") : short);
    for (const line of [...lines].reverse()) {
      const at = (ys) => line.xs.map((x, i) => [one.x(x),
        isNumber(ys[i]) ? y(ys[i]) : null]);
      const style = { "--c": line.colour };
      const kind = "line" + (line.isSecond ? " second" : "") +
        (line.isDashed ? " dash" : "");
      if (line.evaluations) {
        const known = line.evaluations.filter((e) => isNumber(e.accuracy_low));
        if (known.length > 1) {
          one.picture.append(svg("path", { class: "band", ...style, d: path([
            ...known.map((e) => [one.x(e.step), y(e.accuracy_high)]),
            ...known.reverse().map((e) => [one.x(e.step), y(e.accuracy_low)]),
          ]) + "Z" }));
        }
      }
      if (line.mean && isSmooth) {
        // What one train step had is legible of one run only.
        if (isOne) {
          one.picture.append(svg("path", { class: kind + " raw", ...style,
            d: path(at(line.ys)) }));
        }
        one.picture.append(
          svg("path", { class: kind, ...style, d: path(at(line.mean)) }));
      } else {
        one.picture.append(
          svg("path", { class: kind, ...style, d: path(at(line.ys)) }));
      }
      if (line.xs.length <= 40) {
        for (const [x, height] of at(line.ys)) {
          if (isNumber(height)) {
            one.picture.append(svg("circle", { class: "dot", ...style, cx: x,
              cy: height, r: line.xs.length > 20 ? 2.2 : 3 }));
          }
        }
      }
    }
  };
  const valueAt = (line, step) => {
    if (!line) return "–";
    if (step === null) return show(line.ys[line.ys.length - 1]);
    return step > line.run.done ? "–" : show(line.ys[nearest(line.xs, step)]);
  };
  // Of one run a value per line; of several a group per run, of a value per
  // name: a run that has no line of that name leaves its place empty.
  const shown = names.filter((name) => lines.some((line) =>
    line.name === name));
  const groups = isOne ? lines.map((line) => [line]) : runs.map((run) =>
    shown.map((name) => lines.find((line) =>
      line.run === run && line.name === name))).filter((one) =>
    one.some(Boolean));
  const read = (step) => groups.map((group) => {
    const known = group.find(Boolean);
    return el("span", { title: isOne ? null : known.run.name },
      groups.length > 1 && el("span", { class: "swatch",
        "--c": known.colour }),
      isOne && names.length > 1 && el("span", { class: "soft" },
        known.label + " "),
      group.map((line) => valueAt(line, step)).join(" / "));
  });
  const dashed = !isOne && lines.some((line) => line.isDashed) ?
    [shown.map((name) => chart.lines[name]).join(" / ") + " (dashed)"] : [];
  const described = lines.slice(0, 4).map((line) => {
    const ys = line.ys.filter(isNumber);
    return (isOne ? "" : line.run.name + ", ") + line.label + ": from " +
      show(ys[0]) + " to " + show(ys[ys.length - 1]) + ".";
  }).join(" ");
  return frame(chart.title, [chart.note, ...dashed].filter(Boolean).join("; "),
    described, draw, read,
    chart.section === "Learning" ? "large" : "");
}

function phaseChart(run) {
  const { names, first, last, seconds } = run.phases;
  if (!names.length) return null;
  const total = first.map((_, i) =>
    seconds.reduce((sum, one) => sum + (one[i] || 0), 0));
  // The first train step compiles; it would flatten all others.
  const others = total.length > 3 ? total.slice(1) : total;
  const highest = Math.max(...others);
  const limit = (total[0] > 2 * highest ? 1.1 * highest :
    Math.max(...total)) || 1;
  const marks = ticks(0, limit, 4);
  const index = (step) => {
    const found = last.findIndex((one) => one >= step);
    return found < 0 ? last.length - 1 : found;
  };
  const draw = (one) => {
    const y = scale(one, 0, limit);
    axis(one, y, marks, short);
    total.forEach((all, i) => {
      const begin = one.x(first[i] - 1);
      const width = Math.max(0.8, one.x(last[i]) - begin - 1);
      let base = 0;
      names.forEach((name, rank) => {
        const value = seconds[rank][i] || 0;
        const from = y(Math.min(limit, base));
        const to = y(Math.min(limit, base + value));
        base += value;
        if (from - to > 0.05) {
          one.picture.append(svg("rect", { class: "piece",
            "--c": colour(rank), x: begin, width, y: to, height: from - to }));
        }
      });
      if (all > limit * 1.001) {
        one.picture.append(svg("text", { x: begin + width + 4, y: topSide + 10 },
          "↑ " + forms.seconds(all) + ", compiling"));
      }
    });
  };
  const read = (step) => {
    const i = step === null ? null : index(step);
    const value = (ys) => i === null ? median(ys) : ys[i];
    return [...names.map((name, rank) => el("span", {},
      el("span", { class: "swatch box", "--c": colour(rank) }),
      el("span", { class: "soft" }, name + " "),
      forms.seconds(value(seconds[rank])))),
    el("span", {}, el("span", { class: "soft" }, "all "),
      forms.seconds(value(total)))];
  };
  const span = last[0] - first[0] + 1;
  const note = (isOne ? "" : run.name + ": ") + "seconds of a train step" +
    (span > 1 ? ", means of " + span + " steps" : "");
  return frame("Seconds by phase", note, names.map((name, rank) => name + " " +
    forms.seconds(median(seconds[rank]))).join(", ") + ".", draw, read, "wide",
    "median");
}

function curves() {
  const section = byId("curves");
  const smoothing = el("button", { type: "button", class: "small", id: "smooth",
    "aria-pressed": String(isSmooth), onclick: () => {
      isSmooth = !isSmooth;
      keep({ smooth: isSmooth });
      smoothing.setAttribute("aria-pressed", String(isSmooth));
      for (const one of charts) one.draw();
    } }, "Running mean");
  section.append(el("div", { class: "head" },
    el("h2", { id: "curves-title" }, "Curves"), smoothing));
  if (!isOne) {
    section.append(el("div", { class: "legend" }, runs.map((run, index) =>
      el("span", {}, el("span", { class: "swatch", "--c": colour(index) }),
        run.name))));
  }
  const sections = [...new Set(data.charts.map((chart) => chart.section))];
  const absent = [];
  // A run without train steps would lack them for whatever reason.
  const haveBegun = runs.every((run) => run.done);
  for (const name of sections) {
    const grid = el("div", { class: "grid" });
    for (const chart of data.charts) {
      if (chart.section !== name) continue;
      const one = lineChart(chart);
      if (one) grid.append(one.figure);
      else {
        const why = haveBegun && data.absent[Object.keys(chart.lines)[0]];
        absent.push(chart.title + (why ? " (" + why + ")" : ""));
      }
    }
    if (name === "Speed") {
      for (const run of runs.slice().reverse()) {
        const one = phaseChart(run);
        if (one) grid.prepend(one.figure);
      }
    }
    if (grid.childElementCount) section.append(el("h3", {}, name), grid);
  }
  if (absent.length) {
    section.append(el("p", { class: "note absent" },
      runs.some((run) => run.done) ? "Without data: " + absent.join("; ") +
        "." : "No train step is done yet."));
  }
  for (const one of charts) one.draw();
  let width = document.body.clientWidth;
  new ResizeObserver(() => {
    if (document.body.clientWidth === width) return;
    width = document.body.clientWidth;
    for (const one of charts) one.draw();
  }).observe(document.body);
}

// --- Completions ------------------------------------------------------------
// One per prompt that was held out, of all runs together, and one per other
// completion. `first` and `last` are what is compared: one run's answers before
// and after, or the last ones of several runs.
const items = [];
const heldOut = new Map();
runs.forEach((run, index) => run.completions.forEach((found) => {
  const versions = found.versions.map((one) => ({ ...one, run, index }));
  const known = found.source === "held out" && heldOut.get(found.prompt);
  if (known) {
    known.versions.push(...versions);
  } else {
    const item = { ...found, versions, order: items.length };
    items.push(item);
    if (found.source === "held out") heldOut.set(found.prompt, item);
  }
}));
for (const item of items) {
  const finals = item.versions.filter((one, at) =>
    !item.versions[at + 1] || item.versions[at + 1].index !== one.index);
  item.finals = finals;
  item.first = finals.length > 1 ? finals[0] : item.versions[0];
  item.last = item.versions[item.versions.length - 1];
  item.words = [item.prompt, ...item.versions.map((one) => one.text + "\n" +
    one.answer + "\n" + (one.failure || ""))].join("\n").toLowerCase();
}
const worth = (version) => isNumber(version.reward) ? version.reward : 0;
const orders = {
  gained: ["most gained", (a, b) => (worth(b.last) - worth(b.first)) -
    (worth(a.last) - worth(a.first))],
  lost: ["most lost", (a, b) => (worth(a.last) - worth(a.first)) -
    (worth(b.last) - worth(b.first))],
  best: ["best first", (a, b) => worth(b.last) - worth(a.last)],
  worst: ["worst first", (a, b) => worth(a.last) - worth(b.last)],
  longest: ["longest first", (a, b) => b.last.text.length - a.last.text.length],
  logged: ["as logged", (a, b) => a.order - b.order],
};
const sources = { "held out": "held out",
  training: "from training", failed: "not graded" };
const view = { search: kept.search || "", order: kept.order || "gained",
  source: kept.source || "", run: kept.run || "", at: kept.at || 0,
  shade: kept.shade || "confidence", shown: [], step: 0, last: 0, timer: 0 };
let panes = [];

function verdict(version) {
  if (version.failure) return el("span", { class: "wrong" }, "not graded");
  const isRight = version.accuracy >= 1;
  return el("span", {},
    isNumber(version.accuracy) && el("span",
      { class: isRight ? "right" : "wrong" }, isRight ? "✓ right" : "✗ wrong"),
    isNumber(version.reward) && el("span", { class: "soft" },
      "  reward " + number(version.reward)));
}

function grade(item) {
  const sign = (version) => version.failure ? "⚠" :
    version.accuracy >= 1 ? "✓" : "✗";
  const mark = (version) => el("span", { class: version.accuracy >= 1 ?
    "right" : "wrong" }, sign(version) + " " + number(version.reward));
  return el("span", { class: "grade" }, item.finals.length > 1 ?
    item.finals.slice(0, 3).flatMap((one, at) => [at ? " · " : "", mark(one)]) :
    item.versions.length > 1 ? [mark(item.first), " → ", mark(item.last)] :
      mark(item.last));
}

const nameOf = (version) => (isOne ? "" : version.run.name + ", ") +
  stepName(version.step);
const stepName = (step) => step === 0 ? "before training" : "step " + step;

// What all prompts begin with tells none from another.
const preamble = (() => {
  const prompts = [...new Set(items.map((item) => item.prompt))];
  if (prompts.length < 3) return 0;
  let size = Math.min(...prompts.map((prompt) => prompt.length));
  for (const prompt of prompts) {
    while (!prompt.startsWith(prompts[0].slice(0, size))) size -= 1;
  }
  return prompts[0].slice(0, size).search(/\S*$/);
})();
function promptLine(item) {
  const rest = item.prompt.slice(preamble).trim().split("\n")[0];
  return rest ? (preamble > 0 ? "… " : "") + rest : "(empty prompt)";
}

function refreshList() {
  const words = view.search.toLowerCase().split(/\s+/).filter(Boolean);
  view.shown = items.filter((item) =>
    (!view.source || item.source === view.source) &&
    (view.run === "" || item.versions.some((one) =>
      String(one.index) === view.run)) &&
    words.every((word) => item.words.includes(word)))
    .sort(orders[view.order][1]);
  byId("list").replaceChildren(...view.shown.map((item, at) =>
    el("li", {}, el("button", { type: "button", "data-at": at,
      onclick: () => choose(at) },
      el("span", { class: "prompt-line mono" },
        promptLine(item)),
      grade(item),
      el("span", { class: "kind" }, item.source === "held out" ? "held out" :
        (item.source === "failed" ? "not graded, " : "training, ") +
          nameOf(item.last))))));
  byId("count").textContent = view.shown.length === items.length ?
    plural(items.length, "problem") :
    view.shown.length + " of " + plural(items.length, "problem");
  keep({ search: view.search, order: view.order, source: view.source,
    run: view.run });
  choose(Math.min(view.at, Math.max(0, view.shown.length - 1)), true);
}

function choose(at, isQuiet) {
  stop();
  view.at = at;
  keep({ at });
  for (const button of byId("list").querySelectorAll("button")) {
    const isHere = Number(button.dataset.at) === at;
    button.setAttribute("aria-current", String(isHere));
    if (isHere && !isQuiet) button.scrollIntoView({ block: "nearest" });
  }
  const item = view.shown[at];
  const detail = byId("detail");
  if (!item) {
    panes = [];
    detail.replaceChildren(el("p", { class: "note" },
      "No completion has all of these words."));
    return;
  }
  panes = (item.versions.length > 1 ? [item.first, item.last] : [item.last])
    .map((version) => ({ version, item }));
  const area = el("div", { class: "versions" });
  detail.replaceChildren(
    el("div", { class: "prompt", tabindex: 0, role: "group",
      "aria-label": "Prompt" },
      item.prompt),
    player(), area);
  area.append(...panes.map(pane));
  ready();
}

function player() {
  return el("div", { id: "player" },
    el("div", { class: "player" },
      el("div", { class: "buttons" },
        el("button", { type: "button", id: "play", onclick: play }, "▶ Play"),
        el("button", { type: "button", "aria-label": "One step back",
          onclick: () => { stop(); show(view.step - 1); } }, "‹"),
        el("button", { type: "button", "aria-label": "One step forward",
          onclick: () => { stop(); show(view.step + 1); } }, "›")),
      el("input", { type: "range", id: "slider", min: 0, step: 1,
        "aria-label": "Denoising steps done", oninput: (event) => {
          stop(); show(Number(event.target.value)); } }),
      el("output", { id: "where", for: "slider" })),
    el("div", { class: "row" },
      el("span", { class: "choice", role: "group", "aria-label": "Shading" },
        ["confidence", "step", "entropy"].map((name) => el("button", {
          type: "button", class: "small", "data-shade": name,
          onclick: () => shade(name) },
          name[0].toUpperCase() + name.slice(1)))),
      el("span", { class: "scale", id: "scale" })));
}

function pane(one) {
  const item = one.item;
  const box = el("div", { class: "version" });
  one.fill = () => {
    const version = one.version;
    const picker = item.versions.length > 1 ? el("select", {
      "aria-label": "After which train step", onchange: (event) => {
        one.version = item.versions[Number(event.target.value)];
        one.fill();
        ready();
      } }, item.versions.map((other, index) => el("option", { value: index,
        selected: other === version }, nameOf(other)))) :
      el("span", {}, nameOf(version));
    one.tokens = [];
    const text = el("div", { class: "text" + (version.play ? "" : " plain"),
      tabindex: 0, role: "group", "aria-label": "Completion" });
    if (version.play) {
      const how = version.play;
      const special = new Set(how.special);
      const most = Math.max(1e-9, ...how.entropy);
      how.text.forEach((piece, index) => {
        const step = how.step[index];
        const token = el("i", {
          class: [special.has(index) && "special", step === null && "filled"]
            .filter(Boolean).join(" "),
          "--p": Math.exp(how.logprob[index]).toFixed(3),
          "--s": ((step || 0) / Math.max(1, how.steps - 1)).toFixed(3),
          "--h": (how.entropy[index] / most).toFixed(3),
        }, piece.replaceAll("\n", "↵\n"));
        token.tip = JSON.stringify(piece) + "\n" + (step === null ?
          "filled up: the completion had ended" : "unmasked at step " +
          (step + 1) + "\nprobability " +
          number(Math.exp(how.logprob[index])) + "\nentropy " +
          number(how.entropy[index]) + " nats");
        one.tokens.push(token);
        text.append(token);
      });
    } else {
      text.append(version.text);
    }
    const notes = [
      version.failure && "Grader: " + version.failure,
      version.answer && "Answer read: " + version.answer,
      version.play ? plural(version.play.steps, "denoising step") :
        version.left_out ? "denoising steps of " +
          plural(version.left_out, "token") + " left out of the page" :
          "denoising steps not recorded",
    ].filter(Boolean);
    box.replaceChildren(
      el("div", { class: "top-line" }, picker, verdict(version)),
      text, version.play ? strip(version.play, one) : "",
      ...notes.map((note) => el("div", { class: "meta" }, note)));
  };
  one.fill();
  return box;
}

// A bar per denoising step: how probable its tokens were. A click goes there.
function strip(how, one) {
  const found = Array.from({ length: how.steps }, () => []);
  how.step.forEach((step, index) => {
    if (step !== null && found[step]) {
      found[step].push(Math.exp(how.logprob[index]));
    }
  });
  one.bars = found.map((all) => el("b", { "--h": (all.length ?
    100 * all.reduce((a, b) => a + b, 0) / all.length : 0).toFixed(0) + "%" }));
  return el("div", { class: "strip", "aria-hidden": "true",
    title: "Mean probability of each denoising step's tokens",
    onclick: (event) => {
      const at = one.bars.findIndex((bar) =>
        event.clientX <= bar.getBoundingClientRect().right);
      stop();
      show(at < 0 ? one.bars.length : at + 1);
    } }, one.bars);
}

function ready() {
  view.last = Math.max(0, ...panes.map((one) =>
    one.version.play ? one.version.play.steps : 0));
  byId("player").hidden = !view.last;
  byId("slider").max = view.last;
  shade(view.shade);
  show(view.last);
}

// After `step` denoising steps: what is unmasked, and what only just was.
function show(step) {
  view.step = step = Math.min(view.last, Math.max(0, step));
  byId("slider").value = step;
  byId("where").textContent = "step " + step + " of " + view.last;
  for (const one of panes) {
    const how = one.version.play;
    if (!how) continue;
    one.tokens.forEach((token, index) => {
      const done = how.step[index] === null ? how.steps : how.step[index] + 1;
      token.classList.toggle("masked", done > step);
      token.classList.toggle("new", done === step && step > 0 &&
        step < view.last && how.step[index] !== null);
    });
    one.bars.forEach((bar, index) => {
      bar.classList.toggle("done", index < step);
      bar.classList.toggle("now", index === step - 1 && step < view.last);
    });
  }
  byId("tip").hidden = true;
}

function stop() {
  clearInterval(view.timer);
  view.timer = 0;
  if (byId("play")) byId("play").textContent = "▶ Play";
}

function play() {
  if (view.timer) return stop();
  if (!view.last) return undefined;
  if (view.step >= view.last) show(0);
  byId("play").textContent = "❚❚ Pause";
  view.timer = setInterval(() => {
    show(view.step + 1);
    if (view.step >= view.last) stop();
  }, Math.min(400, Math.max(50, 8000 / (view.last + 1))));
  return undefined;
}

function shade(name) {
  view.shade = name;
  keep({ shade: name });
  byId("detail").className = "card detail " + name;
  for (const button of document.querySelectorAll("[data-shade]")) {
    button.setAttribute("aria-pressed", String(button.dataset.shade === name));
  }
  const [from, to] = { confidence: ["unsure", "sure"],
    step: ["first step", "last"], entropy: ["certain", "torn"] }[name];
  byId("scale").replaceChildren(from, el("b"), to);
}

function completions() {
  if (!items.length) return;
  const search = el("input", { type: "search", id: "search", value: view.search,
    placeholder: "Search prompts and completions", "aria-label":
      "Search prompts and completions", oninput: () => {
        view.search = search.value;
        view.at = 0;
        refreshList();
      } });
  const pick = (label, name, options) => el("select", { "aria-label": label,
    id: name, onchange: (event) => {
      view[name] = event.target.value;
      view.at = 0;
      refreshList();
    } }, options.map(([value, text]) => el("option", { value,
      selected: view[name] === value }, text)));
  const there = Object.keys(sources).filter((source) =>
    items.some((item) => item.source === source));
  if (view.source && !there.includes(view.source)) view.source = "";
  const shown = runs.reduce((sum, run) => sum + run.num_shown, 0);
  const logged = runs.reduce((sum, run) => sum + run.num_logged, 0);
  byId("completions").append(
    el("div", { class: "head" },
      el("h2", { id: "completions-title" }, "Completions"),
      el("span", { class: "soft small-text" }, shown.toLocaleString("en-US") +
        " of " + plural(logged, "logged completion"))),
    el("div", { class: "row tools" }, search,
      there.length > 1 && pick("Which", "source", [["", "all kinds"],
        ...there.map((source) => [source, sources[source]])]),
      !isOne && pick("Run", "run", [["", "all runs"],
        ...runs.map((run, index) => [String(index), run.name])]),
      pick("Order", "order", Object.entries(orders).map(([name, [text]]) =>
        [name, text])),
      el("span", { class: "soft small-text", id: "count", role: "status" })),
    el("div", { class: "split" },
      el("ul", { class: "card list", id: "list", "aria-label": "Problems" }),
      el("div", { class: "card detail", id: "detail" })),
    el("p", { class: "note keys absent" }, el("kbd", {}, "/"), " search, ",
      el("kbd", {}, "j"), " ", el("kbd", {}, "k"), " next and previous, ",
      el("kbd", {}, "Space"), " play, ", el("kbd", {}, "←"), " ",
      el("kbd", {}, "→"), " one denoising step."));
  refreshList();
  document.addEventListener("pointerover", (event) => {
    const token = event.target.closest && event.target.closest(".text i");
    const tip = byId("tip");
    tip.hidden = !token;
    if (!token) return;
    tip.textContent = token.classList.contains("masked") ? "still masked" :
      token.tip;
    const at = token.getClientRects()[0];
    const box = tip.getBoundingClientRect();
    tip.style.left = Math.max(8, Math.min(at.left,
      innerWidth - box.width - 8)) + "px";
    tip.style.top = (at.bottom + 8 + box.height < innerHeight ? at.bottom + 8 :
      at.top - box.height - 8) + "px";
  });
}

function isInView(node) {
  const box = node.getBoundingClientRect();
  return box.bottom > 60 && box.top < innerHeight;
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || !items.length) return;
  const target = event.target;
  if (target.matches("input[type=search]")) {
    if (event.key === "Escape") target.blur();
    if (event.key === "Enter") { target.blur(); event.preventDefault(); }
    return;
  }
  if (target.matches("input, select, textarea")) return;
  if (event.key === "/") {
    event.preventDefault();
    byId("search").focus();
    byId("search").select();
    return;
  }
  const isList = target.closest("#list");
  const moves = { j: 1, k: -1, ...(isList && { ArrowDown: 1, ArrowUp: -1 }) };
  if (event.key in moves) {
    event.preventDefault();
    const at = view.at + moves[event.key];
    if (at < 0 || at >= view.shown.length) return;
    choose(at);
    if (isList) byId("list").querySelectorAll("button")[at].focus();
    if (!isInView(byId("detail"))) {
      byId("completions").scrollIntoView({ block: "start" });
    }
    return;
  }
  if (!isInView(byId("completions")) || !panes.length) return;
  const steps = { ArrowLeft: -1, ArrowRight: 1 };
  if (event.key in steps) {
    event.preventDefault();
    stop();
    show(view.step + steps[event.key]);
  } else if (event.key === " " && !target.matches("button:not(#list button), a, summary")) {
    event.preventDefault();
    play();
  }
});

// --- Grading, settings, machine, figures -------------------------------------
function grading() {
  const rows = runs.flatMap((run) => run.failures.map((one) =>
    ({ ...one, run: run.name })));
  const failed = runs.reduce((sum, run) => sum + run.num_failed +
    run.num_timed_out, 0);
  if (!failed && !rows.length) return;
  byId("grading").append(
    el("h2", { id: "grading-title" }, "Not graded"),
    ...runs.map((run) => el("p", {}, (isOne ? "" : run.name + ": ") +
      plural(run.num_failed, "completion") + " whose grader failed, " +
      run.num_timed_out.toLocaleString("en-US") + " out of time; what was " +
      "not decided counts as 0. " +
      "A few of each train step are kept with their reason, and stand among " +
      "the completions.")),
    rows.length ? table([
      ...(isOne ? [] : [{ title: "Run", value: (row) => row.run }]),
      { title: "Reason", value: (row) => row.reason, key: true },
      { title: "Kept", value: (row) => row.count, number: true },
    ], rows, { id: "reasons" }) : "");
}

function settings() {
  const rows = data.settings;
  const different = rows.filter((row) => row.differs).length;
  let only = different > 0 && !isOne;
  const columns = [
    { title: "Setting", value: (row) => row.key, key: true },
    ...runs.map((run, index) => ({ title: run.name, key: true,
      value: (row) => row.values[index] })),
  ];
  const made = table(columns, rows, { id: "config",
    rowClass: (row) => !only && row.differs && "differs" });
  const search = el("input", { type: "search", id: "find-setting",
    placeholder: "Find a setting", "aria-label": "Find a setting",
    oninput: refresh });
  const button = el("button", { type: "button", class: "small",
    id: "only-different", "aria-pressed": String(only), onclick: () => {
      only = !only;
      button.setAttribute("aria-pressed", String(only));
      refresh();
    } }, "Only differences");
  function refresh() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    made.setRows(rows.filter((row) => (!only || row.differs) &&
      words.every((word) =>
        (row.key + " " + row.values.join(" ")).toLowerCase().includes(word))));
  }
  refresh();
  const content = [el("div", { class: "row tools" }, search, !isOne && button),
    made];
  byId("settings").append(
    el("h2", { id: "settings-title" }, "Settings"),
    isOne ? el("details", {}, el("summary", {}, "All " + rows.length +
      " settings"), content) :
    el("p", { class: "soft" }, different ? plural(different, "setting") +
      (different === 1 ? " differs" : " differ") + " between the runs." :
      "All settings are the same."), ...(isOne ? [] : content));
}

function machine() {
  const list = (facts) => el("dl", {}, facts.map(([name, value]) =>
    [el("dt", {}, name), el("dd", {}, value)]));
  const cards = runs.flatMap((run) => {
    const last = run.sessions[run.sessions.length - 1];
    const cost = run.cost;
    const spent = [["Time so far", duration(cost.seconds)],
      ["Cost so far", costText(cost.chip_hours, cost.price)]];
    if (!run.finished && isNumber(cost.seconds_left)) {
      spent.push(["To the end", duration(cost.seconds_left) +
        (isNumber(cost.chip_hours_left) ? ", " +
          costText(cost.chip_hours_left, cost.price) : "")]);
    }
    const parts = [list(spent)];
    if (last) {
      parts.unshift(list([
        ["Devices", last.num_devices + " × " + last.device_kind +
          (last.device_kind === last.platform ? "" :
            " (" + last.platform + ")")],
        ["Processes", String(last.num_processes)],
        ["Started", run.sessions.slice(-5).map((one) => one.since.slice(0, 16) +
          " UTC" + (one.first_step ? ", after train step " + one.first_step :
          "")).join("; ")],
      ]));
      parts.push(list(Object.entries(last.versions)));
    } else {
      parts.unshift(el("p", { class: "note" },
        "Hardware and versions are not recorded."));
    }
    return isOne ? parts.map((part) => el("div", { class: "card" }, part)) :
      el("div", { class: "card" }, el("h3", {}, run.name), parts);
  });
  byId("machine").append(
    el("h2", { id: "machine-title" }, "Machine and cost"),
    el("div", { class: "facts" }, cards),
    el("p", { class: "note absent" }, "Time and cost are those of the train " +
      "steps in the log: loading, the evaluation before the first, and steps " +
      "lost to a kill are not in it. " +
      (runs.some((run) => run.cost.price) ? "" : "Prices are nobody's but " +
      "yours: --chip_hour_price makes money of chip hours.")));
}

function figureTable() {
  const rows = runs.flatMap((run) => run.table.map((row) =>
    ({ ...row, run: run.name })));
  if (!rows.length) return;
  const column = (title, name) => ({ title, value: (row) => row[name],
    cell: (row) => number(row[name]), number: true });
  const search = el("input", { type: "search", id: "find-metric",
    placeholder: "Find a metric", "aria-label": "Find a metric",
    oninput: () => made.setRows(rows.filter((row) =>
      row.name.toLowerCase().includes(search.value.trim().toLowerCase()))) });
  const made = table([
    { title: "Metric", value: (row) => row.name, key: true },
    ...(isOne ? [] : [{ title: "Run", value: (row) => row.run }]),
    column("First", "first"), column("Last", "last"),
    column("Least", "least"), column("Most", "most"),
  ], rows, { id: "metrics" });
  byId("figures").append(
    el("h2", { id: "figures-title" }, "Every metric"),
    el("details", {}, el("summary", {}, plural(rows.length, "row")),
      el("div", { class: "row tools" }, search), made),
    ...runs.filter((run) => run.num_metrics > run.table.length).map((run) =>
      el("p", { class: "note" }, run.table.length + " of " + run.num_metrics +
        " metrics are shown" + (isOne ? "." : " of " + run.name + "."))));
}

// --- The page itself ----------------------------------------------------------
function theme() {
  const names = ["auto", "light", "dark"];
  const button = byId("theme");
  const set = (name) => {
    if (name === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = name;
    button.textContent = { auto: "◐ Auto", light: "☀\uFE0E Light",
      dark: "☾ Dark" }[name];
    button.setAttribute("aria-label", "Colours: " + name);
    keep({ theme: name });
  };
  button.addEventListener("click", () =>
    set(names[(names.indexOf(kept.theme) + 1) % names.length]));
  set(names.includes(kept.theme) ? kept.theme : "auto");
}

function navigation() {
  const titles = { curves: "Curves", completions: "Completions",
    grading: "Not graded", settings: "Settings", machine: "Machine",
    figures: "Metrics" };
  byId("nav").append(...Object.entries(titles)
    .filter(([id]) => byId(id).childElementCount)
    .map(([id, title]) => el("a", { href: "#" + id }, title)));
}

// A page that is being rewritten reads itself again, unless somebody is busy.
function reloading() {
  if (!data.seconds) return;
  let touched = 0;
  for (const name of ["keydown", "pointerdown", "wheel", "touchmove"]) {
    addEventListener(name, () => { touched = Date.now(); }, { passive: true });
  }
  setInterval(() => {
    if (view.timer || Date.now() - touched < 5000) return;
    keep({ open: [...document.querySelectorAll("details")]
      .map((one) => one.open) });  // browsers keep the place themselves
    location.reload();
  }, 1000 * data.seconds);
  document.querySelectorAll("details").forEach((one, index) => {
    one.open = Boolean(kept.open && kept.open[index]);
  });
}

theme();
overview();
curves();
completions();
grading();
settings();
machine();
figureTable();
navigation();
byId("footer").append("Written by agrpo_jax " + data.version + ". Curves show " +
  "the first, the last and the extreme values of up to 240 points.");
reloading();
