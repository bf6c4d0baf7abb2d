"""A decoder's forward pass in float64, written plainly, which the engine is compared with.

It shares no code with the engine: files are read by the gguf package, each architecture is spelled out.
"""

import math
from pathlib import Path

import gguf
import numpy as np

# Architectures whose rotation turns neighbouring dimensions.
NEIGHBOURS = (
    *("llama", "mistral3", "granite", "granitemoe", "smollm3"),
    *("deepseek", "ernie4_5", "ernie4_5-moe"),
)


# Architectures with gates behind attention.
GATED = ("qwen3next", "qwen35", "qwen35moe")
# Those whose norm before the feed-forward part is called post_attention_norm.
LATE = ("gpt-oss", *GATED)


class Reference:
    """A GGUF model wholly in float64."""

    def __init__(self, path: Path, context: int | None = None):
        reader = gguf.GGUFReader(path)
        self.keys = {name: field.contents() for name, field in reader.fields.items()}
        self.arch = self.keys["general.architecture"]
        self.weights = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors
        }
        self.context = context or self.key("context_length")

    def key(self, name, default=None):
        return self.keys.get(f"{self.arch}.{name}", default)

    def of_layer(self, name, layer, default=None):
        value = self.key(name, default)
        return value[layer] if isinstance(value, list) else value

    def logits(self, tokens) -> np.ndarray:
        """float64 [n, n_vocab]"""
        w, eps = self.weights, self.eps()
        h = w["token_embd.weight"][np.asarray(tokens)]
        if self.arch in ("gemma2", "gemma3"):
            h = h * math.sqrt(h.shape[1])
        h = h * self.key("embedding_scale", 1.0)
        for layer in range(self.key("block_count")):
            h = self.block(h, layer)
        h = self.norm(h, "output_norm", eps)
        y = h @ w.get("output.weight", w["token_embd.weight"]).T + w.get("output.bias", 0)
        if self.arch in ("granite", "granitemoe"):
            y = y / self.key("logit_scale")
        cap = self.key("final_logit_softcapping", 30.0 if self.arch == "gemma2" else 0)
        return cap * np.tanh(y / cap) if cap else y

    def eps(self):
        kind = "layer_norm_epsilon" if self.arch == "stablelm" else "layer_norm_rms_epsilon"
        return self.key(f"attention.{kind}")

    def norm(self, x, name, eps):
        """RMS norm, or LayerNorm for StableLM; the identity where the file has no such norm."""
        if f"{name}.weight" not in self.weights:
            return x
        if self.arch == "stablelm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
        return x * self.weights[f"{name}.weight"] + self.weights.get(f"{name}.bias", 0)

    def linear(self, x, name):
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", 0)

    def block(self, h, layer):
        blk, eps, scale = f"blk.{layer}", self.eps(), self.key("residual_scale", 1.0)
        x = self.norm(h, f"{blk}.attn_norm", eps)
        a = self.delta_net(x, blk) if f"{blk}.ssm_out.weight" in self.weights else self.attention(x, layer)
        if self.arch not in LATE:  # whose norm of this name is the next one
            a = self.norm(a, f"{blk}.post_attention_norm", eps)
        if self.arch == "stablelm" and f"{blk}.ffn_norm.weight" not in self.weights:
            return h + a + self.mlp(x, blk)  # StableLM 2 12B: both branches read the same norm
        h = h + scale * a
        name = "post_attention_norm" if self.arch in LATE else "ffn_norm"
        f = self.mlp(self.norm(h, f"{blk}.{name}", eps), blk)
        return h + scale * self.norm(f, f"{blk}.post_ffw_norm", eps)

    def mlp(self, x, blk):
        if f"{blk}.ffn_gate_inp.weight" in self.weights:
            return self.experts(x, blk)
        up = self.linear(x, f"{blk}.ffn_up")
        if f"{blk}.ffn_gate.weight" in self.weights:
            gate = self.linear(x, f"{blk}.ffn_gate")
        else:
            gate, up = np.split(up, 2, axis=-1)
        if self.arch in ("gemma2", "gemma3"):
            gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return self.linear(gate * up, f"{blk}.ffn_down")

    def experts(self, x, blk):
        """Each row alone: a softmax of the router's logits chooses experts and weighs what they give."""
        used, out = self.key("expert_used_count"), np.zeros_like(x)
        for row, logits in enumerate(self.linear(x, f"{blk}.ffn_gate_inp")):
            if self.key("expert_gating_func") == 2:
                p = 1 / (1 + np.exp(-logits))
            else:
                p = np.exp(logits - logits.max())
                p /= p.sum()
            score = p + self.weights.get(f"{blk}.exp_probs_b.bias", 0)
            chosen = sorted(range(len(p)), key=lambda expert: -score[expert])[:used]
            normalized = self.arch not in ("olmoe", "qwen2moe", "deepseek", "dots1")
            if self.key("expert_weights_norm", normalized):
                p /= p[chosen].sum()
            for expert in chosen:
                gate, up = (self.expert(x[row], f"{blk}.ffn_{name}_exps", expert) for name in ("gate", "up"))
                if self.arch == "gpt-oss":
                    gate, up = np.minimum(gate, 7), np.clip(up, -7, 7) + 1
                    inner = gate / (1 + np.exp(-1.702 * gate)) * up
                else:
                    inner = gate / (1 + np.exp(-gate)) * up
                out[row] += p[expert] * self.expert(inner, f"{blk}.ffn_down_exps", expert)
        out *= self.key("expert_weights_scale") or 1.0
        if f"{blk}.ffn_up_shexp.weight" in self.weights:
            gate, up = (self.linear(x, f"{blk}.ffn_{name}_shexp") for name in ("gate", "up"))
            shared = self.linear(gate / (1 + np.exp(-gate)) * up, f"{blk}.ffn_down_shexp")
            if f"{blk}.ffn_gate_inp_shexp.weight" in self.weights:
                logits = x @ self.weights[f"{blk}.ffn_gate_inp_shexp.weight"]
                shared = shared / (1 + np.exp(-logits))[:, None]
            out += shared
        return out

    def expert(self, x, name, index):
        bias = self.weights.get(f"{name}.bias")
        return x @ self.weights[f"{name}.weight"][index].T + (0 if bias is None else bias[index])

    def attention(self, x, layer):
        n, blk, eps = len(x), f"blk.{layer}", self.eps()
        heads = self.of_layer("attention.head_count", layer)
        groups = self.of_layer("attention.head_count_kv", layer, heads)
        width = self.key("embedding_length") // self.of_layer("attention.head_count", 0)
        dim, dim_v = self.key("attention.key_length", width), self.key("attention.value_length", width)
        if f"{blk}.attn_qkv.weight" in self.weights:
            whole = self.linear(x, f"{blk}.attn_qkv")
            q, k, v = np.split(whole, [heads * dim, (heads + groups) * dim], axis=1)
        else:
            q, k, v = (self.linear(x, f"{blk}.attn_{c}") for c in "qkv")
        gate = None
        if self.arch in GATED:
            q, gate = np.split(q.reshape(n, heads, 2 * dim), 2, axis=2)
            q, gate = q.reshape(n, -1), gate.reshape(n, -1)
        q = self.head_norm(q, f"{blk}.attn_q_norm", heads, eps)
        k = self.head_norm(k, f"{blk}.attn_k_norm", groups, eps)
        v = v.reshape(n, groups, dim_v)
        window = self.window(layer)
        pos = np.arange(n)
        if self.rotates(layer):
            q, k = (self.rotate(t, pos, bool(window)) for t in (q, k))
        if self.key("attention.temperature_scale"):
            original = self.key("rope.scaling.original_context_length")
            heat = 1 + self.key("attention.temperature_scale") * np.log(pos // original + 1)
            q = q * heat[:, None, None]
        scale = self.key("attention.scale") or 1 / math.sqrt(dim)
        out = np.zeros((n, heads, dim_v))
        for head in range(heads):
            group = head // (heads // groups)
            s = q[:, head] @ k[:, group].T * scale
            cap = self.key("attn_logit_softcapping", 50.0 if self.arch == "gemma2" else 0)
            if cap:
                s = cap * np.tanh(s / cap)
            far = pos[:, None] - pos[None, :]
            s[(far < 0) | ((far >= window) if window else False)] = -np.inf
            top = s.max(1, keepdims=True)
            p = np.exp(s - top)
            total = p.sum(1, keepdims=True)
            if f"{blk}.attn_sinks.weight" in self.weights:
                total += np.exp(self.weights[f"{blk}.attn_sinks.weight"][head] - top)
            out[:, head] = p / total @ v[:, group]
        out = out.reshape(n, -1)
        return self.linear(out if gate is None else out / (1 + np.exp(-gate)), f"{blk}.attn_output")

    def delta_net(self, x, blk):
        """Gated DeltaNet (Yang et al. 2024) with a matrix M [dim_v, dim] a head, as the paper writes it:

        M_t = M_{t-1} alpha_t (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; o_t = M_t q_t.
        """
        n, w = len(x), {key: self.weights[f"{blk}.ssm_{key}"] for key in ("conv1d.weight", "dt.bias", "a")}
        groups, heads, dim = (
            self.key(f"ssm.{name}") for name in ("group_count", "time_step_rank", "state_size")
        )
        dim_v, each = self.key("ssm.inner_size") // heads, heads // groups
        if f"{blk}.ssm_in.weight" in self.weights:
            by_group = self.linear(x, f"{blk}.ssm_in").reshape(n, groups, -1)
            cuts = np.cumsum([dim, dim, each * dim_v])
            q, k, v, z = (part.reshape(n, -1) for part in np.split(by_group, cuts, axis=2))
            mixed = np.concatenate([q, k, v], axis=1)
        else:
            mixed, z = self.linear(x, f"{blk}.attn_qkv"), self.linear(x, f"{blk}.attn_gate")
        if self.arch == "qwen3next":
            write, keep = np.split(self.linear(x, f"{blk}.ssm_ba").reshape(n, groups, 2 * each), 2, axis=2)
        else:  # whose value heads take turns with the key heads
            write, keep = self.linear(x, f"{blk}.ssm_beta"), self.linear(x, f"{blk}.ssm_alpha")
        beta = 1 / (1 + np.exp(-write.reshape(n, heads)))
        alpha = np.exp(w["a"] * np.log1p(np.exp(keep.reshape(n, heads) + w["dt.bias"])))
        taps = w["conv1d.weight"]
        padded = np.concatenate([np.zeros((taps.shape[1] - 1, mixed.shape[1])), mixed])
        mixed = np.array([(padded[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(n)])
        mixed /= 1 + np.exp(-mixed)
        q, k, v = np.split(mixed, [groups * dim, 2 * groups * dim], axis=1)
        out = np.zeros((n, heads, dim_v))
        for head in range(heads):
            group = head // each if self.arch == "qwen3next" else head % groups
            mine = slice(group * dim, (group + 1) * dim)
            matrix = np.zeros((dim_v, dim))
            for t in range(n):
                q_t, k_t = (y / np.sqrt(y @ y + self.eps()) for y in (q[t, mine], k[t, mine]))
                v_t = v[t, head * dim_v : (head + 1) * dim_v]
                matrix = matrix @ (alpha[t, head] * (np.eye(dim) - beta[t, head] * np.outer(k_t, k_t)))
                matrix += beta[t, head] * np.outer(v_t, k_t)
                out[t, head] = matrix @ q_t / math.sqrt(dim)
        z = z.reshape(n, heads, dim_v)
        gated = self.norm(out, f"{blk}.ssm_norm", self.eps()) * z / (1 + np.exp(-z))
        return self.linear(gated.reshape(n, -1), f"{blk}.ssm_out")

    def head_norm(self, x, name, heads, eps):
        """Norms of queries and keys: over all heads at once in OLMo 2, over each head elsewhere."""
        if self.arch in ("olmo2", "olmoe"):
            x = self.norm(x, name, eps)
        x = x.reshape(len(x), heads, -1)
        return x if self.arch in ("olmo2", "olmoe") else self.norm(x, name, eps)

    def window(self, layer):
        size = self.key("attention.sliding_window", 4096 if self.arch == "gemma2" else 0)
        pattern = self.key("attention.sliding_window_pattern")
        if isinstance(pattern, list):
            return size if pattern[layer] else 0
        every = {"gemma2": 2, "gemma3": 6, "gpt-oss": 2, "olmo2": 4}.get(self.arch)
        if self.arch == "phi3":
            return size
        return size if every and layer % every != every - 1 else 0

    def rotates(self, layer):
        if self.arch == "smollm3":
            return layer % 4 != 3
        return not self.arch.startswith("granite") or self.key("rope.scaling.finetuned", True)

    def rotate(self, x, pos, windowed):
        """Turn pairs as complex numbers: neighbours in Llama's layout, halves in GPT-NeoX's."""
        turn, size = self.speeds(x.shape[-1], windowed)
        rot = 2 * len(turn)
        part, rest = x[..., :rot], x[..., rot:]
        if self.arch in NEIGHBOURS:
            z = part[..., 0::2] + 1j * part[..., 1::2]
        else:
            z = part[..., : rot // 2] + 1j * part[..., rot // 2 :]
        z = z * size * np.exp(1j * pos[:, None] * turn)[:, None]
        if self.arch in NEIGHBOURS:
            part = np.stack([z.real, z.imag], -1).reshape(part.shape)
        else:
            part = np.concatenate([z.real, z.imag], -1)
        return np.concatenate([part, rest], -1)

    def speeds(self, dim, windowed):
        """Radians a position for each pair, and the factor on the rotated values."""
        rot, base = self.key("rope.dimension_count", dim), self.key("rope.freq_base", 10000.0)
        if windowed and self.arch == "gemma3":
            base = self.key("rope.freq_base_swa", 10000.0)
        speed = np.array([base ** (-2 * i / rot) for i in range(rot // 2)])
        if windowed and self.arch in ("gemma3", "olmo2"):
            return speed, 1.0
        original = self.key("rope.scaling.original_context_length", self.key("context_length"))
        for name in ("freqs", "factors_long" if self.context > original else "factors_short"):
            speed = speed / self.weights.get(f"rope_{name}.weight", 1.0)
        factor = self.key("rope.scaling.factor") or self.key("rope.scale_linear") or 1.0
        kind = self.key("rope.scaling.type", "linear")
        size = self.key("rope.scaling.attn_factor", 1.0)
        if kind == "linear":
            return speed / factor, size
        if kind == "yarn":
            return self.yarn(speed, factor, original, rot, base), size * self.yarn_size(factor)
        return speed, size

    def yarn(self, speed, factor, original, rot, base):
        """NTK by parts: fast pairs keep their speed, slow ones are divided, a linear ramp between."""

        def pair(turns):
            return rot * math.log(original / (2 * math.pi * turns)) / (2 * math.log(base))

        first = max(math.floor(pair(self.key("rope.scaling.yarn_beta_fast", 32.0))), 0)
        last = min(math.ceil(pair(self.key("rope.scaling.yarn_beta_slow", 1.0))), rot - 1)
        if first == last:
            last += 0.001
        mix = [min(max((i - first) / (last - first), 0), 1) for i in range(rot // 2)]
        return np.array([s * (1 - m) + s / factor * m for s, m in zip(speed, mix, strict=True)])

    def yarn_size(self, factor):
        damping = self.key("rope.scaling.yarn_log_multiplier", 0.0)
        return (0.1 * math.log(factor) + 1) / (0.1 * damping * math.log(factor) + 1)
