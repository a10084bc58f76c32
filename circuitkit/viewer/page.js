"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { boxes, edges, inner, layers, spans, colours, kinds, first } = data;
  const total = edges.score.length;
  const at = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const number = (value) => value.toLocaleString("en-US");
  const signed = (value) => (value === null ? "not finite" : (value < 0 ? "−" : "+") + Math.abs(value).toPrecision(3));
  const colourOf = (score) => (score < 0 ? colours.negative : colours.positive);
  const strength = (i) => Math.abs(edges.score[i] ?? 0);
  const largest = total ? strength(0) || 1 : 1;
  const heading = (i) => `${boxes[edges.source[i]].name} → ${data.readers[edges.reader[i]]}`;

  // Header, example and legend. Text goes in as text only, so labels cannot become markup.
  at("title").textContent = data.title;
  at("subtitle").textContent = data.subtitle;
  for (const [name, value, small] of data.facts) {
    const fact = make("div");
    const shown = make("dd", value + " ");
    if (small) shown.append(make("small", small));
    fact.append(make("dt", name), shown);
    at("facts").append(fact);
  }
  for (const [name, text] of data.example) {
    const line = make("div");
    line.append(make("b", name), make("span", text));
    at("example").append(line);
    at("example").hidden = false;
  }
  const legend = (text, colour, isLine) => {
    const entry = make("span");
    const sample = make("i", undefined, isLine ? "line" : "");
    sample.style.background = colour;
    entry.append(sample, text);
    at("legend").append(entry);
  };
  if (edges.score.some((score) => score >= 0)) legend(data.effects[0], colours.positive, true);
  if (edges.score.some((score) => score < 0)) legend(data.effects[1], colours.negative, true);
  if (inner.length) legend(data.inner_name, colours.neutral, true);
  for (const kind of new Set(boxes.map((box) => box.kind))) legend(kinds[kind] ?? kind, colours[kind] ?? colours.error);

  if (!total) {
    at("nothing").hidden = false;
    document.querySelector("nav").hidden = at("panel").hidden = true;
    document.body.dataset.ready = Math.round(performance.now());
    return;
  }

  // Places come from Python; the width only is stretched to the shape of the window.
  const longest = Math.max(...boxes.map((box) => box.label.length));
  const boxWidth = Math.max(52, 10 * longest + 14);
  const [left, right] = [Math.min(...boxes.map((b) => b.x)), Math.max(...boxes.map((b) => b.x))];
  const top = Math.max(...boxes.map((box) => box.y));
  const shape = at("graph").clientWidth / Math.max(at("graph").clientHeight, 1);
  // A wide circuit of few lines gets more room between them.
  const tall = Math.min(130, Math.max(64, (0.7 * (right - left) * (boxWidth + 14)) / (shape * Math.max(top, 1))));
  const wide = Math.min(1.9 * boxWidth, Math.max(boxWidth + 14, (0.8 * shape * tall * top) / Math.max(right - left, 1)));
  const place = (x, y) => ({ x: x * wide, y: -y * tall });

  // Layer names stand left of everything, bowed edges included.
  const middleOf = (i) => (boxes[edges.source[i]].x + 2 * edges.bend[i][0] + boxes[edges.target[i]].x) / 4;
  const margin = edges.bend.reduce((least, _, i) => Math.min(least, middleOf(i) * wide), left * wide - boxWidth / 2) - 24;

  const nodeOf = (box, i) => ({
    group: "nodes", classes: `kind-${box.kind}`, position: place(box.x, box.y),
    data: { id: `n${i}`, number: i, label: box.label, colour: colours[box.kind] ?? colours.error },
  });
  const labelOf = ([text, y], i) => ({
    group: "nodes", classes: "layer", selectable: false, grabbable: false,
    position: { x: margin, y: -y * tall }, data: { id: `l${i}`, label: text },
  });
  const headingOf = ([text, x], i) => ({
    group: "nodes", classes: "layer span", selectable: false, grabbable: false,
    position: place(x, top + 1), data: { id: `s${i}`, label: text },
  });
  const edgeOf = (i) => {
    const [s, t] = [boxes[edges.source[i]], boxes[edges.target[i]]];
    const [a, b, bend] = [place(s.x, s.y), place(t.x, t.y), place(...edges.bend[i])];
    const [dx, dy] = [b.x - a.x, b.y - a.y];
    const length = Math.hypot(dx, dy) || 1;
    // A loop is as high as its bend says; cytoscape's loops reach about as far as their control points.
    const bow = edges.source[i] === edges.target[i] ? a.y - bend.y
      : ((bend.x - (a.x + b.x) / 2) * -dy + (bend.y - (a.y + b.y) / 2) * dx) / length;
    const share = strength(i) / largest;
    return {
      group: "edges",
      data: {
        id: `e${i}`, number: i, source: `n${edges.source[i]}`, target: `n${edges.target[i]}`, bow, share,
        rank: total - i, width: 1 + 9 * share ** 0.8, colour: colourOf(edges.score[i]), opacity: 1,
      },
    };
  };
  const innerOf = ([s, t], i) => ({
    group: "edges", classes: "inner", data: { id: `i${i}`, source: `n${s}`, target: `n${t}` },
  });

  const cy = cytoscape({
    container: at("graph"),
    elements: [...boxes.map(nodeOf), ...layers.map(labelOf), ...spans.map(headingOf), ...inner.map(innerOf)],
    layout: { name: "preset" },
    minZoom: 0.05, maxZoom: 4, boxSelectionEnabled: false, hideEdgesOnViewport: total > 1500,
    style: [
      { selector: "node[colour]", style: {
        shape: "round-rectangle", width: boxWidth, height: 36, label: "data(label)", "font-size": 17,
        "text-valign": "center", "background-color": "data(colour)", "border-width": 1.5, "border-color": "#98a2b3",
        color: colours.text, "font-family": "system-ui, sans-serif" } },
      { selector: "node.kind-kv", style: { "border-style": "dashed" } },
      { selector: "node.layer", style: {
        label: "data(label)", "background-opacity": 0, width: 1, height: 1, "text-halign": "left", color: colours.muted,
        "text-valign": "center", "font-size": 19, "font-family": "system-ui, sans-serif", events: "no" } },
      { selector: "node.span", style: { "text-halign": "center", "font-weight": "bold", color: colours.text } },
      { selector: "edge[colour]", style: {
        "curve-style": "unbundled-bezier", "edge-distances": "node-position", "control-point-distances": "data(bow)",
        "control-point-weights": 0.5, width: "data(width)", "line-color": "data(colour)", opacity: "data(opacity)",
        "target-arrow-color": "data(colour)", "z-index": "data(rank)", "loop-direction": "0deg", "loop-sweep": "-60deg" } },
      { selector: "edge.arrow", style: { "target-arrow-shape": "triangle", "arrow-scale": 0.9 } },
      { selector: "edge.inner", style: {
        "curve-style": "straight", width: 1.5, "line-style": "dashed", "line-color": colours.neutral, opacity: 0.8,
        events: "no", "z-index": 0 } },
      { selector: ".off", style: { display: "none" } },
      { selector: ".faded", style: { opacity: 0.06 } },
      { selector: "node.faded", style: { opacity: 0.25 } },
      { selector: "edge.lit", style: { opacity: 0.95, "z-index": 1000000 } },
      { selector: "node.chosen", style: { "border-width": 4, "border-color": colours.text } },
    ],
  });

  // Edges are made when they are first shown, so that a large circuit opens fast.
  let made = 0, shown = 0, chosen = null;
  const show = (n) => {
    shown = Math.max(1, Math.min(total, Math.round(n) || 1));
    const crowd = Math.min(1, Math.sqrt(150 / shown));
    cy.batch(() => {
      if (shown > made) {
        cy.add(Array.from({ length: shown - made }, (_, i) => edgeOf(made + i)));
        made = shown;
      }
      const used = new Set();
      for (let i = 0; i < made; i += 1) {
        const edge = cy.getElementById(`e${i}`);
        edge.toggleClass("off", i >= shown);
        edge.toggleClass("arrow", shown <= 400);
        if (i >= shown) continue;
        const share = edge.data("share");
        edge.data("opacity", Math.min(0.92, (0.3 + 0.65 * Math.sqrt(share)) * (crowd + (1 - crowd) * share)));
        used.add(edges.source[i]).add(edges.target[i]);
      }
      boxes.forEach((_, i) => cy.getElementById(`n${i}`).toggleClass("off", !used.has(i)));
      layers.forEach(([, , members], i) =>
        cy.getElementById(`l${i}`).toggleClass("off", !members.some((box) => used.has(box))));
    });
    at("count").value = shown;
    at("slider").value = Math.round(1000 * Math.sqrt((shown - 1) / Math.max(total - 1, 1)));
    if (chosen !== null && cy.getElementById(`n${chosen}`).hasClass("off")) chosen = null;
    choose(chosen);
  };

  // The panel: the strongest edges, or the edges of one node.
  const rowOf = (i, text, target) => {
    const row = make("button", undefined, "row");
    const bar = make("i");
    bar.style.width = `${Math.max(1, (100 * strength(i)) / largest)}%`;
    bar.style.background = colourOf(edges.score[i]);
    row.append(make("span", text), make("span", signed(edges.score[i])), bar);
    row.title = edges.stderr[i] === null ? heading(i) : `${heading(i)}\nstandard error ${edges.stderr[i].toPrecision(2)}`;
    row.addEventListener("click", () => choose(target, true));
    return row;
  };
  const list = (title, numbers, textOf, targetOf) => {
    if (!numbers.length) return;
    at("panel").append(make("h3", `${title} (${number(numbers.length)})`));
    for (const i of numbers.slice(0, 200)) at("panel").append(rowOf(i, textOf(i), targetOf(i)));
    if (numbers.length > 200) at("panel").append(make("p", `and ${number(numbers.length - 200)} weaker ones`));
  };
  const choose = (which, centre) => {
    chosen = which;
    const visible = Array.from({ length: shown }, (_, i) => i);
    at("panel").replaceChildren();
    cy.batch(() => {
      cy.elements().removeClass("faded lit chosen");
      if (chosen === null) return;
      const node = cy.getElementById(`n${chosen}`);
      const near = node.closedNeighborhood();
      cy.elements().not(near).not(".layer").addClass("faded");
      near.edges().not(".inner").addClass("lit");
      node.addClass("chosen");
    });
    if (chosen === null) {
      at("panel").append(make("h2", "Strongest edges"), make("p", "Click a node to see what it reads and writes."));
      list("edges", visible, heading, (i) => edges.source[i]);
      return;
    }
    const box = boxes[chosen];
    at("panel").append(make("h2", box.name), make("p", `${kinds[box.kind] ?? box.kind}${data.places[chosen]}`));
    list("reads from", visible.filter((i) => edges.target[i] === chosen),
      (i) => boxes[edges.source[i]].name + data.slots[i], (i) => edges.source[i]);
    list("writes to", visible.filter((i) => edges.source[i] === chosen),
      (i) => data.readers[edges.reader[i]], (i) => edges.target[i]);
    if (centre) cy.animate({ center: { eles: cy.getElementById(`n${chosen}`) }, duration: 150 });
  };

  const tip = at("tip");
  const tell = (event, text) => {
    tip.textContent = text;
    tip.hidden = false;
    const { clientX: x, clientY: y } = event.originalEvent;
    tip.style.left = `${Math.min(x + 14, window.innerWidth - 350)}px`;
    tip.style.top = `${Math.min(y + 14, window.innerHeight - 70)}px`;
  };
  cy.on("mousemove", "edge", (event) => {
    const i = event.target.data("number");
    const error = edges.stderr[i] === null ? "" : ` ± ${edges.stderr[i].toPrecision(2)}`;
    tell(event, `${heading(i)}\nscore ${signed(edges.score[i])}${error}, rank ${number(i + 1)} of ${number(total)}`);
  });
  cy.on("mousemove", "node", (event) => {
    const box = boxes[event.target.data("number")];
    const degree = (end) => edges[end].slice(0, shown).filter((n) => boxes[n] === box).length;
    tell(event, `${box.name}, ${kinds[box.kind] ?? box.kind}\nreads ${degree("target")}, writes ${degree("source")}`);
  });
  cy.on("mouseout", () => { tip.hidden = true; });
  cy.on("tap", (event) => { if (event.target === cy) choose(null); });
  cy.on("tap", "node", (event) => choose(event.target.data("number")));
  cy.on("tap", "edge", (event) => choose(edges.target[event.target.data("number")]));

  let waiting = 0;
  at("slider").addEventListener("input", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => show(1 + (total - 1) * (at("slider").value / 1000) ** 2));
  });
  at("count").max = total;
  at("count").addEventListener("change", () => show(Number(at("count").value)));
  at("total").textContent = `of ${number(total)}, strongest first`;
  for (const box of boxes) {
    const option = make("option");
    option.value = box.name;
    at("names").append(option);
  }
  at("search").addEventListener("input", () => {
    const wanted = at("search").value.trim().toLowerCase();
    const here = boxes.map((box, i) => [box.name.toLowerCase(), i]).filter(([, i]) => !cy.getElementById(`n${i}`).hasClass("off"));
    const match = here.find(([name]) => name === wanted) ?? (wanted.length > 1 && here.find(([name]) => name.startsWith(wanted)));
    choose(match ? match[1] : null, true);
  });
  let moved = false;
  const fit = () => {
    cy.resize();
    cy.fit(cy.elements().not(".off"), 30);
    if (cy.zoom() > 1.4) { cy.zoom(1.4); cy.center(cy.elements().not(".off")); }
    moved = false;
  };
  at("fit").addEventListener("click", fit);
  cy.on("dragpan scrollzoom pinchzoom", () => { moved = true; });
  // Drawn at once: resizing empties the canvas, and waiting for the next frame would flicker.
  new ResizeObserver(() => { if (moved) cy.resize(); else fit(); cy.forceRender(); }).observe(at("graph"));
  at("picture").addEventListener("click", () => {
    const link = make("a");
    link.href = URL.createObjectURL(cy.png({ output: "blob", bg: "#ffffff", full: true, scale: 2, maxWidth: 6000 }));
    link.download = "circuit.png";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 5000);
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") choose(null); });

  show(first);
  fit();
  document.body.dataset.ready = Math.round(performance.now());
})();
