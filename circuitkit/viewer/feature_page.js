"use strict";
// The pictures and the controls. Places come from Python; the width and height are stretched to the window.
(() => {
  const { data, nodes, edges, field, own, state, n } = graph;
  const { make, svg, number, signed, percent, colourOf, describe } = panel;
  const at = (id) => document.getElementById(id);
  const MOST_LINES = 400, OVERVIEW = 160, FONT = "12px system-ui, sans-serif";
  const SHAPES = {
    latent: "M-1 0A1 1 0 1 1 1 0A1 1 0 1 1 -1 0Z", unit: "M-1 0L-.5 -.9L.5 -.9L1 0L.5 .9L-.5 .9Z",
    error: "M0 -1.15L1.15 0L0 1.15L-1.15 0Z", bias: "M-1 -.8L1 -.8L0 1Z", token: "M-.9 -.9H.9V.9H-.9Z",
    position: "M-.8 -.8H.8V.8H-.8Z", logit: "M0 -1.1L1.05 -.34L.65 .9L-.65 .9L-1.05 -.34Z",
    direction: "M0 -1.15L1.05 .95L0 .4L-1.05 .95Z", score: "M-.95 -.95H.95L-.95 .95H.95Z",
  };
  const shapeOf = (kind) => SHAPES[kind] ?? SHAPES.latent;
  const canvas = document.createElement("canvas").getContext("2d");
  const widthOf = (text, bold) => {
    canvas.font = bold ? `600 ${FONT}` : FONT;
    return canvas.measureText(text).width;
  };
  const cut = (text, most) => ([...text].length > most ? `${[...text].slice(0, most - 1).join("")}…` : text);
  const place = { kx: 1, ky: 1, tx: 0, ty: 0 };
  const screenX = (x) => x * place.kx + place.tx;
  const screenY = (y) => place.ty - y * place.ky;
  const box = { width: 0, height: 0, left: 92, right: 70, top: 86, bottom: 60 };
  box.left = 18 + Math.max(40, ...data.rows.map(([label]) => widthOf(label)));
  let least = 0.01, within = data.threshold, moved = false, waiting = 0;

  let kept = new Set(); // pinned or in a group
  const isAlways = (i) => graph.isFinal(i) || nodes.kind[i] === "token" || field.token_prob[i] > 0;
  const isShown = (i) => isAlways(i) || nodes.share[i] <= within + 1e-9 || kept.has(i) || state.clicked === i;
  let shown = [];

  // One mark for each node; they are moved, never made anew.
  const largest = Math.max(1e-30, ...nodes.influence.filter((_, i) => !isAlways(i)));
  const sizes = nodes.influence.map((value, i) => (isAlways(i) ? 1.1 : 0.75 + 0.55 * Math.sqrt(Math.min(1, value / largest))));
  const marks = nodes.kind.map((kind, i) => {
    const mark = svg("path", { d: shapeOf(kind), class: `mark ${kind}`, "data-i": i });
    at("marks").append(mark);
    return mark;
  });

  const chosenLines = () => {
    const good = (e) => graph.share[e] >= least && shown[edges.source[e]] && shown[graph.target[e]];
    if (state.clicked === null && !kept.size) {
      const strongest = graph.byFlow.filter(good).slice(0, OVERVIEW);
      return strongest.map((e, rank) => [e, 0.22 + 0.5 * (1 - rank / strongest.length) ** 2]);
    }
    const found = new Map();
    const strong = (list) => list.filter(good).sort((a, b) => graph.share[b] - graph.share[a]).slice(0, MOST_LINES);
    for (const i of kept) {
      for (const e of strong([...graph.into[i], ...graph.out[i]]).slice(0, 40)) {
        const both = kept.has(edges.source[e]) && kept.has(graph.target[e]);
        found.set(e, both ? 0.85 : state.clicked === null ? 0.3 : 0.12);
      }
    }
    if (state.clicked !== null) {
      for (const e of strong([...graph.into[state.clicked], ...graph.out[state.clicked]])) found.set(e, 0.85);
    }
    return [...found];
  };
  const curve = (x0, y0, x1, y1) => {
    if (Math.abs(y1 - y0) < 4) {
      const lift = Math.min(46, 10 + 0.22 * Math.abs(x1 - x0));
      return `M${x0} ${y0}C${x0 + 0.25 * (x1 - x0)} ${y0 - lift} ${x0 + 0.75 * (x1 - x0)} ${y1 - lift} ${x1} ${y1}`;
    }
    const middle = (y0 + y1) / 2;
    // Within a column lines bow, or they would run through the nodes between.
    if (Math.abs(x1 - x0) < 6 && Math.abs(y1 - y0) > 60) {
      const bow = Math.min(34, 0.11 * Math.abs(y1 - y0));
      return `M${x0} ${y0}C${x0 - bow} ${y0 + 0.3 * (y1 - y0)} ${x1 - bow} ${y0 + 0.7 * (y1 - y0)} ${x1} ${y1}`;
    }
    return `M${x0} ${y0}C${x0} ${middle} ${x1} ${middle} ${x1} ${y1}`;
  };
  const widthFor = (weight, most) => 0.8 + 6.2 * (Math.abs(weight) / (most || 1)) ** 0.8;
  let lines = [];
  const drawLines = () => {
    const most = lines.reduce((found, [e, clear]) => (clear > 0.2 ? Math.max(found, Math.abs(edges.weight[e])) : found), 0);
    const drawn = [...lines].sort((a, b) => a[1] - b[1] || graph.share[a[0]] - graph.share[b[0]]).map(([e, clear]) => {
      const [s, t] = [edges.source[e], graph.target[e]];
      const line = svg("path", {
        class: "line", "data-e": e, stroke: colourOf(edges.weight[e]), "stroke-opacity": clear,
        "stroke-width": Math.min(clear > 0.2 ? 7 : 3, widthFor(edges.weight[e], most)).toFixed(2),
        d: curve(...[screenX(nodes.x[s]), screenY(nodes.y[s]), screenX(nodes.x[t]), screenY(nodes.y[t])].map((v) => +v.toFixed(1))),
      });
      return line;
    });
    at("lines").replaceChildren(...drawn);
  };

  const drawAxes = () => {
    const { width, height, left, bottom } = box;
    const bands = [], axes = [];
    data.columns.forEach(([, , x, w], c) => {
      const [from, to] = [screenX(x - w / 2 - 0.4), screenX(x + w / 2 + 0.4)];
      if (c % 2 === 0) bands.push(svg("rect", { class: "band", x: from, y: 0, width: Math.max(0, to - from), height: height - bottom }));
    });
    data.rows.forEach(([, y, h], r) => {
      const edge = screenY(y + h / 2 + 0.5);
      if (r < data.rows.length - 1) bands.push(svg("line", { class: "rule", x1: 0, x2: width, y1: edge, y2: edge }));
    });
    at("bands").replaceChildren(...bands);
    axes.push(svg("rect", { class: "veil", x: 0, y: height - bottom, width, height: bottom }));
    axes.push(svg("rect", { class: "veil", x: 0, y: 0, width: left - 8, height, "fill-opacity": 0.86 }));
    // Labels that would overlap are left out, after slanting them.
    const texts = data.columns.map(([label]) => cut(label.trim() || label, 14));
    const slant = data.columns.some(([, position, , w], c) => position !== null && (w + 0.8) * place.kx < widthOf(texts[c]) + 6);
    let free = -Infinity;
    data.columns.forEach(([label, position, x], c) => {
      const middle = screenX(x), need = slant ? 14 : widthOf(texts[c]) + 6;
      if (middle < left - 4 || middle > width || middle - (slant ? 7 : need / 2) < free) return;
      free = middle + (slant ? 7 : need / 2);
      const y = height - bottom + 15;
      const text = svg("text", { class: `axis${position === null ? "" : " token"}`, x: middle, y, "text-anchor": slant ? "end" : "middle",
        ...(slant ? { transform: `rotate(-42 ${middle} ${y})`, dx: 4 } : {}) }, texts[c]);
      text.append(svg("title", {}, position === null || data.merged ? label : `${label} (${data.across} ${position})`));
      axes.push(text);
    });
    free = Infinity;
    data.rows.forEach(([label, y]) => {
      const middle = screenY(y) + 4;
      if (middle < 10 || middle > height - bottom + 4 || free - middle < 14) return;
      free = middle;
      axes.push(svg("text", { class: "axis", x: left - 14, y: middle, "text-anchor": "end" }, label));
    });
    at("axes").replaceChildren(...axes);
  };

  // Names of what matters most, as far as they do not overlap.
  const drawLabels = (size) => {
    const taken = [], drawn = [];
    const free = (r) => taken.every((o) => r.x1 < o.x0 || r.x0 > o.x1 || r.y1 < o.y0 || r.y0 > o.y1);
    const finals = shown.map((on, i) => (on && graph.isFinal(i) ? i : -1)).filter((i) => i >= 0)
      .sort((a, b) => field.token_prob[b] - field.token_prob[a]);
    const stand = [];
    for (const i of finals) {
      const [x, y] = [screenX(nodes.x[i]), screenY(nodes.y[i])];
      if (stand.some(([a, b]) => Math.abs(a - x) < 11.5 && Math.abs(b - y) < 60)) continue;
      stand.push([x, y]);
      const said = own.value[i] > 0 && nodes.kind[i] === "logit" ? ` ${percent(own.value[i])}` : "";
      const name = cut(graph.label(i), 18) + said;
      drawn.push(svg("text", { class: `label${state.names[i] ? " named" : ""}`, x: x + 3, y: y - size * 1.6,
        transform: `rotate(-52 ${x + 3} ${y - size * 1.6})` }, name));
    }
    const rest = [...new Set([...(state.clicked === null ? [] : [state.clicked]), ...kept,
      ...state.names.flatMap((name, i) => (name === null ? [] : [i]))])].filter((i) => shown[i] && !graph.isFinal(i) && (nodes.kind[i] !== "token" || state.names[i] !== null));
    for (const i of rest) {
      const name = cut(graph.label(i), 26), w = 2 + widthOf(name, state.names[i] !== null), [x, y] = [screenX(nodes.x[i]), screenY(nodes.y[i])];
      const gap = size * 1.5 + 2;
      const spots = [[x + gap, y + 4], [x - gap - w, y + 4], [x - w / 2, y - gap], [x - w / 2, y + gap + 9]];
      const fits = ([a, b]) => a > box.left - 8 && a + w < box.width && free({ x0: a, x1: a + w, y0: b - 11, y1: b + 3 });
      const spot = spots.find(fits);
      if (!spot) continue;
      taken.push({ x0: spot[0], x1: spot[0] + w, y0: spot[1] - 11, y1: spot[1] + 3 });
      drawn.push(svg("text", { class: `label${state.names[i] ? " named" : ""}`, x: spot[0], y: spot[1] }, name));
    }
    at("labels").replaceChildren(...drawn);
  };

  const draw = () => {
    waiting = 0;
    if (!box.width) return; // not laid out yet
    const size = Math.max(2.1, Math.min(8.5, 0.36 * Math.min(place.kx, place.ky)));
    for (let i = 0; i < n; i += 1) {
      if (shown[i]) marks[i].setAttribute("transform", `translate(${screenX(nodes.x[i]).toFixed(1)} ${screenY(nodes.y[i]).toFixed(1)}) scale(${(size * sizes[i]).toFixed(2)})`);
    }
    drawAxes();
    drawLines();
    drawLabels(size);
  };
  const soon = () => { waiting ||= requestAnimationFrame(draw); };

  // What is shown, faded and lit follows from the state alone.
  const update = () => {
    kept = new Set([...state.pins, ...state.groups.flatMap((group) => group.members)]);
    shown = Array.from({ length: n }, (_, i) => isShown(i));
    lines = chosenLines();
    const near = new Set(kept);
    if (state.clicked !== null) near.add(state.clicked);
    for (const [e, clear] of lines) if (clear > 0.2) near.add(edges.source[e]).add(graph.target[e]);
    const some = state.clicked !== null || kept.size > 0;
    marks.forEach((mark, i) => {
      mark.style.display = shown[i] ? "" : "none";
      mark.classList.toggle("faded", some && !near.has(i));
      mark.classList.toggle("pinned", kept.has(i));
      mark.classList.toggle("chosen", state.clicked === i || Boolean(state.group?.members.includes(i)));
    });
    const visible = shown.filter(Boolean).length;
    at("nodes-said").textContent = `${percent(within)}: ${number(visible)} of ${number(n)}`;
    at("edges-said").textContent = `from ${percent(least)} of an input`;
    at("nodes").value = Math.round(1000 * within);
    at("edges").value = least > 0 ? Math.round(1000 + 1000 * (Math.log10(least / 0.5) / 4)) : 0;
    panel.show();
    drawSubgraph();
    draw();
  };

  const fit = () => {
    const area = at("graph").getBoundingClientRect();
    [box.width, box.height] = [area.width, area.height];
    const xs = data.columns.map(([, , x, w]) => [x - w / 2 - 0.4, x + w / 2 + 0.4]);
    const ys = data.rows.map(([, y, h]) => [y - h / 2 - 0.5, y + h / 2 + 0.5]);
    const [x0, x1] = [xs[0]?.[0] ?? 0, xs[xs.length - 1]?.[1] ?? 1];
    const [y0, y1] = [ys[0]?.[0] ?? 0, ys[ys.length - 1]?.[1] ?? 1];
    const [roomX, roomY] = [Math.max(60, box.width - box.left - box.right), Math.max(60, box.height - box.top - box.bottom)];
    place.kx = Math.min(110, roomX / (x1 - x0));
    place.ky = Math.min(80, roomY / (y1 - y0));
    place.tx = box.left + (roomX - place.kx * (x1 - x0)) / 2 - place.kx * x0;
    place.ty = box.height - box.bottom + place.ky * y0 - (roomY - place.ky * (y1 - y0)) / 2;
    moved = false;
    draw();
  };

  // The subgraph: groups and pinned nodes as boxes; an edge is the sum of the direct effects between its ends.
  const drawSubgraph = () => {
    const items = state.groups.map((group) => ({ group, members: group.members }));
    for (const i of state.pins) if (!graph.groupOf(i)) items.push({ members: [i] });
    const pane = at("subgraph"), wanted = items.length > 0 && at("split").getAttribute("aria-pressed") === "true";
    if (pane.hidden === wanted) {
      pane.hidden = !wanted;
      if (!moved) fit();
    }
    if (!wanted) return;
    const mean = (list, of) => list.reduce((sum, i) => sum + of(i), 0) / list.length;
    const levels = [...new Set(items.map((item) => (item.row = Math.round(mean(item.members, (i) => nodes.row[i])))))].sort((a, b) => a - b);
    const area = pane.getBoundingClientRect();
    const pitch = Math.max(44, (area.height - 44) / Math.max(1, levels.length - 1 || 1));
    const end = data.columns[data.columns.length - 1], span = end ? end[2] + end[3] / 2 : 1;
    let right = area.width;
    for (const item of items) {
      item.label = item.group ? item.group.label : cut(describe(item.members[0]), 30);
      item.small = item.group ? `${item.members.length} nodes` : "";
      item.w = Math.min(210, Math.max(widthOf(cut(item.label, 32)), widthOf(item.small)) + 22);
      item.x = 30 + (area.width - 60) * (mean(item.members, (i) => nodes.x[i]) / span);
      item.y = levels.length === 1 ? area.height / 2 : area.height - 22 - pitch * levels.indexOf(item.row);
    }
    for (const row of levels) {
      const line = items.filter((item) => item.row === row).sort((a, b) => a.x - b.x);
      line.forEach((item, k) => { item.x = Math.max(item.x, item.w / 2 + 6, k ? line[k - 1].x + (line[k - 1].w + item.w) / 2 + 14 : 0); });
      for (let k = line.length - 1; k >= 0; k -= 1) {
        const limit = k === line.length - 1 ? area.width - 6 : line[k + 1].x - line[k + 1].w / 2 - 14;
        line[k].x = Math.max(Math.min(line[k].x, limit - line[k].w / 2), line[k].w / 2 + 6 - 1e4 * (line[k].w > limit));
      }
      line.forEach((item, k) => { if (k) item.x = Math.max(item.x, line[k - 1].x + (line[k - 1].w + item.w) / 2 + 14); });
      right = Math.max(right, ...line.map((item) => item.x + item.w / 2 + 6));
    }
    const home = new Map();
    items.forEach((item, k) => item.members.forEach((i) => { if (!home.has(i)) home.set(i, k); }));
    const sums = new Map();
    for (const [i, k] of home) {
      for (const e of graph.into[i]) {
        const from = home.get(edges.source[e]);
        if (from === undefined || from === k) continue;
        sums.set(`${from} ${k}`, (sums.get(`${from} ${k}`) ?? 0) + edges.weight[e]);
      }
    }
    const most = Math.max(0, ...[...sums.values()].map(Math.abs));
    const drawn = [...sums].sort((a, b) => Math.abs(a[1]) - Math.abs(b[1])).map(([ends, weight]) => {
      const [a, b] = ends.split(" ").map((k) => items[Number(k)]);
      const up = Math.abs(a.y - b.y) < 4 ? 0 : Math.sign(a.y - b.y) * 14;
      const line = svg("path", { class: "line", d: curve(a.x, a.y - up, b.x, b.y + up), stroke: colourOf(weight),
        "stroke-opacity": 0.75, "stroke-width": widthFor(weight, most).toFixed(2) });
      line.append(svg("title", {}, `${a.label} → ${b.label}\n${signed(weight)}`));
      return line;
    });
    const low = Math.min(0, ...items.map((item) => item.y - 22));
    at("boxes").setAttribute("viewBox", `0 ${low} ${right} ${area.height - low}`);
    at("boxes").replaceChildren(...drawn, ...items.map((item) => {
      const lit = item.group ? item.group === state.group : item.members[0] === state.clicked;
      const made = svg("g", { class: `box${item.group ? " group" : ""}${lit ? " chosen" : ""}`, tabindex: 0, role: "button", "aria-label": item.label });
      const half = item.small ? 17 : 14;
      made.append(svg("rect", { x: item.x - item.w / 2, y: item.y - half, width: item.w, height: 2 * half }));
      made.append(svg("text", { x: item.x, y: item.y + (item.small ? -1 : 4) }, cut(item.label, 32)));
      if (item.small) made.append(svg("text", { class: "small", x: item.x, y: item.y + 11 }, item.small));
      const pick = () => (item.group ? chooseGroup(item.group) : choose(item.members[0]));
      made.addEventListener("click", pick);
      made.addEventListener("keydown", (event) => { if (event.key === "Enter") pick(); });
      return made;
    }));
  };

  const say = (text) => { at("said").textContent = text ?? ""; };
  const remember = (text) => { try { history.replaceState(null, "", text); } catch { /* a frame without an address */ } };
  const choose = (i, centre) => {
    state.clicked = i;
    state.group = null;
    remember(i === null ? "#" : `#node=${encodeURIComponent(graph.own.name[i])}`);
    if (centre && i !== null) {
      const [x, y] = [screenX(nodes.x[i]), screenY(nodes.y[i])];
      if (x < box.left || x > box.width || y < 0 || y > box.height - box.bottom) {
        place.tx += box.width / 2 - x;
        place.ty += box.height / 2 - y;
      }
    }
    update();
  };
  const chooseGroup = (group) => { state.clicked = null; state.group = group; update(); };
  const changed = (trouble) => { say(trouble); update(); };
  panel.connect({ choose, chooseGroup, changed, isShown: (i) => shown[i] });

  // Header and legend. Text goes in as text only, so labels cannot become markup.
  at("title").textContent = at("title").title = data.title;
  at("subtitle").textContent = [data.model, data.tokens.length ? `${data.tokens.length} ${data.merged ? "token" : data.across}${data.tokens.length === 1 ? "" : "s"}` : ""].filter(Boolean).join(" · ");
  for (const [name, value, detail] of data.facts) {
    const fact = make("div");
    fact.append(make("dt", name), make("dd", value));
    at("facts").append(fact);
    if (detail) at("subtitle").append(` · ${detail}`);
  }
  const legend = (sample, text) => {
    const entry = make("span");
    const drawn = svg("svg", { width: 18, height: 12, viewBox: "-9 -6 18 12" });
    drawn.append(sample);
    entry.append(drawn, text);
    at("legend").append(entry);
  };
  for (const kind of Object.keys(data.kinds).filter((kind) => nodes.kind.includes(kind))) {
    legend(svg("path", { d: shapeOf(kind), class: `mark ${kind}`, transform: "scale(4.6)" }), data.kinds[kind]);
  }
  for (const [sign, text] of [[1, "supports"], [-1, "opposes"]]) {
    legend(svg("line", { x1: -9, x2: 9, y1: 0, y2: 0, stroke: colourOf(sign), "stroke-width": 4 }), text);
  }
  at("legend").append(make("span", "width: |effect| · size of a node: its influence"));

  // Controls.
  at("nodes").addEventListener("input", () => { within = at("nodes").value / 1000; update(); });
  at("edges").addEventListener("input", () => { least = 0.5 * 10 ** (4 * (at("edges").value / 1000 - 1)); update(); });
  at("fit").addEventListener("click", fit);
  at("split").addEventListener("click", () => {
    at("split").setAttribute("aria-pressed", String(at("split").getAttribute("aria-pressed") !== "true"));
    update();
    fit();
  });
  for (let i = 0; i < Math.min(n, 2000); i += 1) {
    const option = make("option");
    option.value = graph.own.name[i];
    option.label = graph.label(i);
    at("names").append(option);
  }
  at("search").addEventListener("input", () => {
    const wanted = at("search").value.trim().toLowerCase();
    if (!wanted) return;
    const texts = Array.from({ length: n }, (_, i) => [graph.own.name[i].toLowerCase(), graph.label(i).toLowerCase()]);
    let found = texts.findIndex((both) => both.includes(wanted));
    if (found < 0 && wanted.length > 1) found = texts.findIndex((both) => both.some((text) => text.includes(wanted)));
    say(found < 0 ? "no such node" : "");
    if (found >= 0) choose(found, true);
  });
  at("save").addEventListener("click", async () => {
    const name = `${data.file.metadata.slug}.json`, content = new Blob([graph.text()], { type: "application/json" });
    if (window.showSaveFilePicker) {
      try {
        const handle = await window.showSaveFilePicker({ suggestedName: name, types: [{ accept: { "application/json": [".json"] } }] });
        const writer = await handle.createWritable();
        await writer.write(content);
        await writer.close();
        say(`saved ${handle.name}`);
        return;
      } catch (error) {
        if (error.name === "AbortError") return;
      }
    }
    const link = make("a");
    link.href = URL.createObjectURL(content);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
    say(`saved ${name}`);
  });
  at("load").addEventListener("click", () => at("file").click());
  at("file").addEventListener("change", async () => {
    const [chosen] = at("file").files;
    at("file").value = "";
    if (chosen) changed(graph.read(await chosen.text()));
  });

  // Pointer and keys.
  const tip = at("tip");
  const tell = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    tip.style.left = `${Math.min(event.clientX + 14, window.innerWidth - 330)}px`;
    tip.style.top = `${Math.min(event.clientY + 14, window.innerHeight - 60)}px`;
  };
  let drag = null;
  at("graph").addEventListener("pointerdown", (event) => { drag = { x: event.clientX, y: event.clientY, far: false }; });
  window.addEventListener("pointerup", () => { setTimeout(() => { drag = null; at("graph").classList.remove("dragging"); }); });
  at("graph").addEventListener("pointermove", (event) => {
    if (drag && event.buttons) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      if (!drag.far && Math.hypot(dx, dy) < 4) return;
      at("graph").classList.add("dragging");
      place.tx += dx;
      place.ty += dy;
      drag = { x: event.clientX, y: event.clientY, far: true };
      moved = true;
      soon();
      return;
    }
    const { i, e } = event.target.dataset ?? {};
    if (i !== undefined) tell(event, `${describe(Number(i))}\n${data.kinds[nodes.kind[i]] ?? nodes.kind[i]} · ${data.rows[nodes.row[i]][0]}`);
    else if (e !== undefined) tell(event, `${describe(edges.source[e])} → ${describe(graph.target[e])}\n${signed(edges.weight[e])}, ${percent(graph.share[e])} of its input`);
    else tip.hidden = true;
  });
  at("graph").addEventListener("pointerleave", () => { tip.hidden = true; });
  at("graph").addEventListener("click", (event) => {
    if (drag?.far) return;
    const { i, e } = event.target.dataset ?? {};
    choose(i !== undefined ? Number(i) : e !== undefined ? graph.target[e] : null);
  });
  at("graph").addEventListener("wheel", (event) => {
    event.preventDefault();
    const by = Math.exp(-0.0016 * event.deltaY), area = at("graph").getBoundingClientRect();
    const [x, y] = [event.clientX - area.left, event.clientY - area.top];
    place.kx *= by;
    place.ky *= by;
    place.tx = x + (place.tx - x) * by;
    place.ty = y + (place.ty - y) * by;
    moved = true;
    soon();
  }, { passive: false });
  const step = (dx, dy) => {
    const from = state.clicked ?? 0;
    let best = null, least_ = Infinity;
    for (let i = 0; i < n; i += 1) {
      const [x, y] = [nodes.x[i] - nodes.x[from], nodes.y[i] - nodes.y[from]];
      const along = x * dx + y * dy, off = Math.abs(x * dy) + Math.abs(y * dx);
      if (i === from || !shown[i] || along <= 0.01) continue;
      if (along + 2.5 * off < least_) [best, least_] = [i, along + 2.5 * off];
    }
    if (best !== null) choose(best, true);
  };
  const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] };
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement;
    if (event.key === "Escape") { event.target.blur?.(); choose(null); return; }
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "/") { event.preventDefault(); at("search").focus(); }
    if (event.key === "p" && state.clicked !== null) {
      changed(state.pins.includes(state.clicked) ? graph.unpin(state.clicked) : graph.pin(state.clicked));
    }
    if (STEPS[event.key] && document.activeElement === at("graph") && n) { event.preventDefault(); step(...STEPS[event.key]); }
  });

  // A link can choose a node and pin, group and name others: #node=m3.f17@5&pin=input@1&group=["girl","input@4"]&name=["input@1","who"]
  const follow = () => {
    const asked = new URLSearchParams(window.location.hash.slice(1).replaceAll("+", "%2B"));
    const find = (name) => graph.named.get(name) ?? null;
    const pairs = (key) => asked.getAll(key).flatMap((text) => {
      try { const found = JSON.parse(text); return Array.isArray(found) ? [found.map(String)] : []; } catch { return []; }
    });
    for (const name of asked.getAll("pin")) if (find(name) !== null) graph.pin(find(name));
    for (const [text, ...members] of pairs("group")) for (const name of members) if (find(name) !== null) graph.join(find(name), text);
    for (const [name, text] of pairs("name")) if (find(name) !== null && text !== undefined) graph.rename(find(name), text);
    if (asked.has("node")) { state.clicked = find(asked.get("node")); state.group = null; }
    if (asked.has("nodes")) within = Math.min(1, Math.max(0, Number(asked.get("nodes")) || 0));
    if (asked.has("saved")) {
      const saved = make("pre", graph.text());
      saved.id = "saved";
      saved.hidden = true;
      document.body.append(saved);
    }
    update();
  };
  window.addEventListener("hashchange", follow);
  new ResizeObserver(() => { if (moved) draw(); else { fit(); drawSubgraph(); } }).observe(at("graph"));
  follow();
  fit();
  document.body.dataset.ready = Math.round(performance.now());
})();
