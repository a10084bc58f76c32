"use strict";
// The panel beside the picture: one node with its inputs, outputs and dashboard, one group, or what is pinned.
const panel = (() => {
  const { data, nodes, edges, field, own, state } = graph;
  const element = document.getElementById("panel");
  const make = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const svg = (tag, attributes, text) => {
    const made = document.createElementNS(document.getElementById("graph").namespaceURI, tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const number = (value) => value.toLocaleString("en-US");
  const short = (value) => (Math.abs(value) >= 1000 || (value && Math.abs(value) < 0.001) ? value.toExponential(1) : value.toPrecision(3));
  const signed = (value) => (value < 0 ? "−" : "+") + short(Math.abs(value));
  const percent = (value) => `${(100 * value).toPrecision(value < 0.0995 ? 2 : 3)}%`;
  const colourOf = (value) => (value < 0 ? data.colours.negative : data.colours.positive);
  const token = (i) => {
    const [text, position] = data.columns[nodes.column[i]];
    if (position === null) return text;
    if (data.texts) return `“${text}”`;
    return data.across === "step" && text === String(position) ? `step ${position}` : `token ${text}`;
  };
  const inside = (i) => !["token", "logit", "position"].includes(nodes.kind[i]);
  const describe = (i) => (inside(i) && data.columns[nodes.column[i]][1] !== null && data.columns.length > 1 ? `${graph.label(i)} · ${token(i)}` : graph.label(i));
  let act = { choose() {}, chooseGroup() {}, changed() {}, isShown: () => true };

  const button = (text, title, run) => {
    const made = make("button", text);
    made.type = "button";
    made.title = title;
    made.addEventListener("click", run);
    return made;
  };
  const field_ = (value, placeholder, list, run) => {
    const made = make("input");
    made.type = "text";
    made.value = value;
    made.placeholder = made.ariaLabel = placeholder;
    made.maxLength = 200;
    if (list) made.setAttribute("list", list);
    made.addEventListener("change", () => run(made.value));
    return made;
  };

  const edgeRow = (e, other, largest) => {
    const row = make("button", undefined, "row");
    row.type = "button";
    const bar = make("i");
    bar.style.width = `${Math.max(1, (100 * Math.abs(edges.weight[e])) / largest)}%`;
    bar.style.background = colourOf(edges.weight[e]);
    row.append(make("span", describe(other)), make("span", signed(edges.weight[e])), bar);
    row.title = `${describe(edges.source[e])} → ${describe(graph.target[e])}\n${percent(graph.share[e])} of what the latter gets`;
    row.classList.toggle("hidden-node", !act.isShown(other));
    row.addEventListener("click", () => act.choose(other, true));
    return row;
  };
  const edgeList = (title, list, otherOf, more) => {
    const column = make("div");
    column.append(make("h3", `${title} (${number(list.length)})`));
    const rows = make("div", undefined, "rows");
    const largest = list.reduce((most, e) => Math.max(most, Math.abs(edges.weight[e])), 0) || 1;
    for (const e of list.slice(0, 150)) rows.append(edgeRow(e, otherOf(e), largest));
    if (list.length > 150) rows.append(make("p", `and ${number(list.length - 150)} weaker ones`));
    column.append(rows);
    if (more) column.append(make("p", more));
    return column;
  };
  // What a row adds up to, less what is listed.
  const missing = (i) => {
    const row = graph.rowOf[i];
    if (row < 0) return inside(i) && nodes.kind[i] === "latent" ? "not explored" : "";
    const listed = graph.into[i].reduce((sum, e) => sum + edges.weight[e], 0);
    const rest = edges.total[row] - listed;
    return Math.abs(rest) > 1e-3 * (edges.sum[row] || 1) ? `not listed: ${signed(rest)} of ${signed(edges.total[row])}` : "";
  };

  const context = ([texts, acts, at], most) => {
    const line = make("p", undefined, "context");
    texts.forEach((text, k) => {
      if (!(acts[k] > 0)) { line.append(text); return; }
      const mark = make("mark", text, k === at ? "peak" : "");
      mark.style.background = `rgba(245, 158, 11, ${(0.12 + 0.68 * Math.min(1, acts[k] / (most || 1))).toFixed(2)})`;
      mark.title = `activation ${short(acts[k])}`;
      line.append(mark);
    });
    return line;
  };
  const chips = (title, list) => {
    const column = make("div", undefined, "chips");
    column.append(make("h3", title));
    for (const [text, value] of list) {
      const line = make("div");
      line.append(make("span", text), make("span", signed(value)));
      column.append(line);
    }
    return column;
  };
  const histogram = (board) => {
    const drawn = svg("svg", { class: "histogram", viewBox: "0 0 340 74", role: "img", "aria-label": "histogram of activations" });
    const most = Math.max(1, ...board.counts.map((count) => Math.log1p(count)));
    const width = 340 / board.counts.length;
    board.counts.forEach((count, k) => {
      const height = (56 * Math.log1p(count)) / most;
      const bar = svg("rect", { x: k * width, y: 58 - height, width: Math.max(0.5, width - 1), height });
      bar.append(svg("title", {}, `${short(board.edges[k])} to ${short(board.edges[k + 1])}: ${number(count)}`));
      drawn.append(bar);
    });
    drawn.append(svg("text", { x: 0, y: 71 }, short(board.edges[0])));
    drawn.append(svg("text", { x: 340, y: 71, "text-anchor": "end" }, short(board.edges[board.edges.length - 1])));
    return drawn;
  };
  const dashboard = (board) => {
    element.append(make("h3", `top activations · active on ${percent(board.frequency)} of tokens, at most ${short(board.max)}`));
    for (const example of board.top.slice(0, 8)) element.append(context(example, board.max));
    for (const [name, examples] of board.intervals) {
      if (!examples.length) continue;
      const more = make("details");
      more.append(make("summary", name), ...examples.map((example) => context(example, board.max)));
      element.append(more);
    }
    if (board.top_logits.length) {
      const pair = make("div", undefined, "pair");
      pair.append(chips("raises these logits", board.top_logits), chips("lowers these", board.bottom_logits));
      element.append(pair);
    }
    element.append(make("h3", "activations where active (log counts)"), histogram(board));
  };

  const showNode = (i) => {
    const kind = data.kinds[nodes.kind[i]] ?? nodes.kind[i];
    const [, position] = data.columns[nodes.column[i]];
    const where = [kind, data.rows[nodes.row[i]][0]];
    if (position !== null) where.push(token(i), ...(data.merged || token(i) === `${data.across} ${position}` ? [] : [`${data.across} ${position}`]));
    element.append(make("h2", graph.label(i)), make("p", where.join(" · ")));
    const value = { logit: "probability", latent: "activation", unit: "value", direction: "value", score: "value" }[nodes.kind[i]];
    const facts = [own.name[i]];
    if (value) facts.push(`${value} ${short(own.value[i])}`);
    if (nodes.influence[i] > 0) facts.push(`influence ${short(nodes.influence[i])}`);
    if (nodes.count) facts.push(`in ${number(nodes.count[i])} prompts`);
    element.append(make("p", facts.join(" · ")));
    const pinned = state.pins.includes(i);
    const actions = make("div", undefined, "actions");
    actions.append(
      button(pinned ? "unpin" : "pin", "keep in the subgraph (p)", () => act.changed(pinned ? graph.unpin(i) : graph.pin(i))),
      field_(state.names[i] ?? "", "rename", "", (text) => act.changed(graph.rename(i, text))),
      field_(graph.groupOf(i)?.label ?? "", "put in group", "groups", (text) =>
        act.changed(text.trim() ? graph.join(i, text) : graph.leave(i))),
    );
    const pair = make("div", undefined, "pair");
    pair.append(
      edgeList("inputs", graph.into[i], (e) => edges.source[e], missing(i)),
      edgeList("outputs", graph.out[i], (e) => graph.target[e], ""),
    );
    element.append(actions, pair);
    if (nodes.board[i] !== null) dashboard(data.boards[nodes.board[i]]);
  };
  const plainRow = (text, small, run) => {
    const row = make("button", undefined, "row");
    row.type = "button";
    row.append(make("span", text), make("span", small));
    row.addEventListener("click", run);
    return row;
  };
  const showGroup = (group) => {
    const actions = make("div", undefined, "actions");
    actions.append(
      field_(group.label, "rename the group", "", (text) => {
        if (text.trim()) group.label = text.trim();
        act.changed("");
      }),
      button("ungroup", "dissolve the group; its nodes stay pinned", () => {
        for (const i of [...group.members]) graph.leave(i);
        act.changed("");
      }),
    );
    element.append(make("h2", group.label), make("p", `group of ${group.members.length}`), actions, make("h3", "members"));
    for (const i of group.members) element.append(plainRow(describe(i), own.name[i], () => act.choose(i, true)));
  };
  const showOverview = () => {
    element.append(make("h2", "Nothing selected"));
    element.append(make("p", "Click a node for its inputs, outputs and examples. p pins it, arrow keys go on, / searches."));
    if (state.groups.length) element.append(make("h3", `groups (${state.groups.length})`));
    for (const group of state.groups) {
      element.append(plainRow(group.label, `${group.members.length} nodes`, () => act.chooseGroup(group)));
    }
    if (state.pins.length) element.append(make("h3", `pinned (${state.pins.length})`));
    for (const i of state.pins) element.append(plainRow(describe(i), data.rows[nodes.row[i]][0], () => act.choose(i, true)));
    const finals = Array.from({ length: graph.n }, (_, i) => i).filter((i) => field.token_prob[i] > 0);
    finals.sort((a, b) => field.token_prob[b] - field.token_prob[a]);
    if (finals.length) element.append(make("h3", "explained"));
    for (const i of finals.slice(0, 20)) {
      const said = nodes.kind[i] === "logit" ? percent(own.value[i]) : `weight ${short(field.token_prob[i])}`;
      element.append(plainRow(describe(i), said, () => act.choose(i, true)));
    }
    if (graph.byFlow.length) element.append(make("h3", "edges that carry most influence"));
    for (const e of graph.byFlow.slice(0, 30)) {
      const row = edgeRow(e, graph.target[e], Math.abs(edges.weight[e]) || 1);
      row.firstChild.textContent = `${describe(edges.source[e])} → ${describe(graph.target[e])}`;
      row.lastChild.style.width = percent(graph.share[e]);
      element.append(row);
    }
  };

  const show = () => {
    element.replaceChildren();
    const list = document.getElementById("groups");
    list.replaceChildren(...state.groups.map((group) => {
      const option = make("option");
      option.value = group.label;
      return option;
    }));
    if (state.group !== null) showGroup(state.group);
    else if (state.clicked !== null) showNode(state.clicked);
    else showOverview();
  };
  return { show, make, svg, number, short, signed, percent, colourOf, describe, token, connect: (actions) => { act = actions; } };
})();
