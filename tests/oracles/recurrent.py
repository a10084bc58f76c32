"""The literal circuit of a torch recurrent layer: one unit, one gate, one step and one edge at a time.

Edges are named as users see them; ``removed(source, destination, step)`` says whether an edge carries its corrupt value
when it is read at a step. Nothing here knows of blocks, links or masks.
"""

import torch


def run(module, head, x, corrupt, removed, start=None):
    """Outputs ``[batch, step, class]`` of one-layer, one-direction networks.

    ``corrupt`` is the corrupt run's record: ``{"x": [b, t, n], "h": [b, t, n], "c": ...}``.
    """
    kind = type(module).__name__
    n, steps = module.hidden_size, x.shape[1]
    zeros = torch.zeros(len(x), n, dtype=x.dtype)
    begin = {name: (start or {}).get(name, zeros).expand(len(x), -1) for name in "hc"}
    h, c, outputs, states = begin["h"], begin["c"], [], {"x": x, "h": [], "c": []}
    for t in range(steps):
        before = {name: corrupt[name][:, t - 1] if t else begin[name] for name in "hc"}

        def pre(gate, j, slot, parts=("ih", "hh"), t=t, h=h, before=before):
            total = torch.zeros(len(x), dtype=x.dtype)
            if "ih" in parts:
                total = total + module.bias_ih_l0[gate * n + j]
                for i in range(x.shape[2]):
                    value = corrupt["x"][:, t, i] if removed(f"x{i}", slot, t) else x[:, t, i]
                    total = total + module.weight_ih_l0[gate * n + j, i] * value
            if "hh" in parts:
                total = total + module.bias_hh_l0[gate * n + j]
                for i in range(n):
                    value = before["h"][:, i] if removed(f"l0.h{i}", slot, t) else h[:, i]
                    total = total + module.weight_hh_l0[gate * n + j, i] * value
            return total

        new_h, new_c = [], []
        for j in range(n):
            if kind == "RNN":
                new_h.append(getattr(torch, module.nonlinearity)(pre(0, j, f"l0.h{j}")))
            elif kind == "GRU":
                r = torch.sigmoid(pre(0, j, f"l0.h{j}<r>"))
                z = torch.sigmoid(pre(1, j, f"l0.h{j}<z>"))
                inside = pre(2, j, f"l0.h{j}<n>", ("ih",)) + r * pre(2, j, f"l0.h{j}<hn>", ("hh",))
                carried = before["h"][:, j] if removed(f"l0.h{j}", f"l0.h{j}<carry>", t) else h[:, j]
                new_h.append((1 - z) * torch.tanh(inside) + z * carried)
            else:
                i, f, g, o = (pre(k, j, f"l0.{'h' if s == 'o' else 'c'}{j}<{s}>") for k, s in enumerate("ifgo"))
                carried = before["c"][:, j] if removed(f"l0.c{j}", f"l0.c{j}<carry>", t) else c[:, j]
                new_c.append(torch.sigmoid(f) * carried + torch.sigmoid(i) * torch.tanh(g))
                new_h.append(torch.sigmoid(o) * torch.tanh(new_c[-1]))
        h = torch.stack(new_h, 1)
        c = torch.stack(new_c, 1) if new_c else c
        states["h"].append(h)
        states["c"].append(c)
        read = [corrupt["h"][:, t, i] if removed(f"l0.h{i}", "logits", t) else h[:, i] for i in range(n)]
        outputs.append(torch.stack(read, 1) @ head.weight.T + head.bias)
    states |= {name: torch.stack(states[name], 1) for name in "hc"}
    return torch.stack(outputs, 1), states
