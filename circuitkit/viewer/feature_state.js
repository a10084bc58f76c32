"use strict";
// The graph, what a reader did to it (pins, groups, names), and the file that holds both.
const graph = (() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { nodes, edges, file } = data;
  const n = nodes.label.length;
  const field = Object.fromEntries(file.fields.map((key, k) => [key, file.values[k]]));
  const own = Object.fromEntries(file.own_fields.map((key, k) => [key, file.own_values[k]]));
  const ids = field.node_id ?? [];
  const number = new Map(ids.map((id, i) => [id, i]));
  const named = new Map((own.name ?? []).map((name, i) => [name, i]));
  const isFinal = (i) => data.finals.includes(nodes.kind[i]);
  const MOST_PINNED = 200;

  // Edges of each node; an edge's share is of all magnitudes that its target gets, edges that were left out included.
  const m = edges.source.length;
  const target = new Int32Array(m), share = new Float64Array(m);
  const into = Array.from({ length: n }, () => []), out = Array.from({ length: n }, () => []);
  const rowOf = new Int32Array(n).fill(-1);
  let at = 0;
  edges.target.forEach((node, row) => {
    rowOf[node] = row;
    for (let k = 0; k < edges.count[row]; k += 1, at += 1) {
      target[at] = node;
      share[at] = Math.abs(edges.weight[at]) / (edges.sum[row] || 1);
      into[node].push(at);
      out[edges.source[at]].push(at);
    }
  });
  const magnitude = (e) => Math.abs(edges.weight[e]);
  for (const list of into) list.sort((a, b) => magnitude(b) - magnitude(a));
  for (const list of out) list.sort((a, b) => share[b] - share[a]);
  const flow = (e) => share[e] * (nodes.influence[target[e]] + field.token_prob[target[e]]);
  const byFlow = Array.from({ length: m }, (_, e) => e).sort((a, b) => flow(b) - flow(a));

  const state = { pins: [], groups: [], names: file.names.slice(), clicked: null, group: null, places: "" };

  // Characters that files cannot hold or eyes cannot see, as the Python side shows them.
  const visible = (text) => [...text].map((c) => {
    const code = c.codePointAt(0);
    if (c === "\n") return "⏎";
    if (code < 32) return String.fromCodePoint(0x2400 + code);
    if (code === 127) return "␡";
    const unseen = (code > 127 && code < 160) || (code >= 0xd800 && code <= 0xdfff) || code === 0x2028 || code === 0x2029
      || (code & 0xfffe) === 0xfffe || (code >= 0x202a && code <= 0x202e) || (code >= 0x2066 && code <= 0x2069);
    if (!unseen) return c;
    return code < 256 ? `\\x${code.toString(16).padStart(2, "0")}` : `\\u${code.toString(16).padStart(4, "0")}`;
  }).join("");

  const label = (i) => state.names[i] ?? nodes.label[i];
  const groupOf = (i) => state.groups.find((group) => group.members.includes(i)) ?? null;
  const pin = (i) => {
    if (state.pins.includes(i)) return "";
    if (state.pins.length >= MOST_PINNED) return `at most ${MOST_PINNED} nodes can be pinned`;
    state.pins.push(i);
    return "";
  };
  const leave = (i) => {
    for (const group of state.groups) group.members = group.members.filter((member) => member !== i);
    state.groups = state.groups.filter((group) => group.members.length);
    if (!state.groups.includes(state.group)) state.group = null;
  };
  const unpin = (i) => {
    leave(i);
    state.pins = state.pins.filter((other) => other !== i);
  };
  const join = (i, text) => {
    const wanted = visible(text.trim());
    const trouble = pin(i);
    if (trouble || !wanted) return trouble;
    if (groupOf(i)?.label === wanted) return "";
    const found = state.groups.find((group) => group.label === wanted);
    leave(i);
    if (found && found.members.length) found.members.push(i);
    else state.groups.push({ label: wanted, members: [i] });
    return "";
  };
  const rename = (i, text) => { state.names[i] = visible(text.trim()) || null; };

  // In and out of the fields that graph viewers share.
  const key = (i) => `${field.layer[i]}_${field.feature[i]}_${field.ctx_idx[i]}`;
  const params = () => ({
    pinnedIds: state.pins.map((i) => ids[i]),
    supernodes: state.groups.map((group) => [group.label, ...group.members.map((i) => ids[i])]),
    linkType: "both",
    clickedId: state.clicked === null ? "" : ids[state.clicked],
    sg_pos: state.places,
    clerps: state.names.flatMap((name, i) => (name === null ? [] : [[key(i), name]])),
  });
  const take = (saved, names) => {
    const list = (value) => (Array.isArray(value) ? value : []);
    const known = (id) => number.has(id);
    state.pins = [...new Set(list(saved.pinnedIds).filter(known))].slice(0, MOST_PINNED).map((id) => number.get(id));
    state.groups = list(saved.supernodes).filter(Array.isArray)
      .map(([text, ...members]) => ({ label: String(text), members: members.filter(known).map((id) => number.get(id)) }))
      .filter((group) => group.members.length);
    state.names = names;
    const keys = new Map(ids.map((_, i) => [key(i), i]));
    for (const entry of list(saved.clerps)) {
      const i = Array.isArray(entry) ? keys.get(entry[0]) ?? number.get(entry[0]) : undefined;
      if (i !== undefined) state.names[i] = String(entry[1]);
    }
    state.clicked = number.get(saved.clickedId) ?? null;
    state.group = null;
    state.places = typeof saved.sg_pos === "string" ? saved.sg_pos : "";
  };
  const read = (text) => {
    let saved;
    try { saved = JSON.parse(text); } catch { return "this file is not JSON"; }
    const rows = Array.isArray(saved?.nodes) ? saved.nodes : [];
    const here = rows.filter((row) => number.has(row?.node_id));
    if (!here.length || typeof saved.qParams !== "object" || saved.qParams === null) return "this file is of another graph";
    const names = Array(n).fill(null);
    for (const row of here) {
      if (typeof row.circuitkit?.label === "string") names[number.get(row.node_id)] = row.circuitkit.label;
    }
    take(saved.qParams, names);
    return here.length < n ? `loaded; ${n - here.length} of the nodes here are not in that file` : "loaded";
  };
  const clerp = (i) => {
    const name = state.names[i], plain = field.clerp[i];
    if (name === null) return plain;
    return isFinal(i) ? `${name.replaceAll("(p=", "( p=")} ${plain.slice(plain.lastIndexOf("(p="))}` : name;
  };
  const text = () => {
    const rows = ids.map((_, i) => {
      const row = Object.fromEntries(file.fields.map((name) => [name, field[name][i]]));
      // What is absent was not written; an index is there even where there is none.
      const kept = file.own_fields.filter((name) => own[name][i] !== null || name === "index");
      row.circuitkit = Object.fromEntries(kept.map((name) => [name, own[name][i]]));
      if (state.names[i] !== null) row.circuitkit.label = state.names[i];
      row.clerp = clerp(i);
      return row;
    });
    const links = edges.source.map((source, e) => ({ source: ids[source], target: ids[target[e]], weight: edges.weight[e] }));
    const metadata = edges.left_out ? { ...file.metadata, links_left_out: edges.left_out } : file.metadata;
    return JSON.stringify({ metadata, qParams: params(), nodes: rows, links });
  };

  take(file.state, file.names.slice());
  return {
    data, nodes, edges, field, own, n, state, into, out, target, share, byFlow, rowOf, named, label, groupOf, isFinal,
    pin, unpin, join, leave, rename, read, text,
  };
})();
