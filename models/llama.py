"""Llama, Mistral, Qwen2 and Qwen3: one decoder, whose few differences are fields of ModelConfig.

Plain tensors instead of nn.Module: nothing here is trained, and a parameter is a lookup in a slot. q, k, v are one matrix
and so are gate and up; their rows are filled from the checkpoint's separate tensors. Within each q and k head the rows are
reordered so that the two of a rotary pair are neighbours (their dot products do not change by it).

One rank's part for any group (models/split.py says which): q, k, v, gate and up by rows, o and down by columns with one sum
over the tensor ranks each, embedding and head by rows of the vocabulary, layers by stages. Alone, a rank holds everything, and
the sums are nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kernels import ops
from kernels.quantized import pack, quantize
from models.config import ModelConfig, Rope
from models.interface import WHOLE, ForwardBatch, NoOtherRanks, OnLayer, Shard, TensorRanks
from models.quantization import FLOATS, Quantization
from models.quantized_load import GrowingMatrix, RoundedRows, Rows, StoredRows
from models.split import Split, split
from models.weights import Slot, Target
from protocol.parallel import part


class Layer:
    """One rank's parameters of one decoder layer. None: this family has none, or another rank adds it."""

    __slots__ = (
        "attention_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias",
        "mlp_norm", "gate_up", "gate_up_bias", "down", "down_bias", "window",
    )  # fmt: skip

    def __init__(
        self,
        config: ModelConfig,
        own: Split,
        adds: bool,
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        is_quantized: bool,
    ) -> None:
        def new(*shape: int) -> Tensor:
            return torch.empty(*shape, dtype=dtype, device=device)

        def matrix(out_width: int, in_width: int) -> Any:  # until pack(); then an ops.Matrix
            return GrowingMatrix(out_width, in_width, device) if is_quantized else new(out_width, in_width)

        hidden, width = config.hidden_size, len(own.inner)
        q_width = len(own.q_heads) * config.head_dim
        qkv_width = q_width + 2 * len(own.kv_heads) * config.head_dim
        self.attention_norm = new(hidden)
        self.qkv = matrix(qkv_width, hidden)
        self.qkv_bias = new(qkv_width) if config.qkv_bias else None
        self.q_norm = new(config.head_dim) if config.qk_norm else None
        self.k_norm = new(config.head_dim) if config.qk_norm else None
        self.o = matrix(hidden, q_width)
        self.o_bias = new(hidden) if config.o_bias and adds else None
        self.mlp_norm = new(hidden)
        self.gate_up = matrix(2 * width, hidden)
        self.gate_up_bias = new(2 * width) if config.mlp_bias else None
        self.down = matrix(hidden, width)
        self.down_bias = new(hidden) if config.mlp_bias and adds else None
        self.window = window


class Llama:
    """models.interface.Model. Parameters are uninitialised until the slots are filled. Raises ConfigError (models/split.py).

    Of a stage's tensor ranks the first one adds the bias and the residual before a sum over them, so they are added once.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        device: torch.device,
        shard: Shard = WHOLE,
        ranks: TensorRanks | None = None,
        quantization: Quantization = FLOATS,
    ) -> None:
        self.quantization = quantization
        self.config = config
        self.shard = shard
        self.own = split(config, shard)
        self.ranks: TensorRanks = ranks if ranks is not None else NoOtherRanks()
        self._dtype, self._device = dtype, device
        self._adds = shard.tp_rank == 0
        self.layers = [
            Layer(config, self.own, self._adds, config.window(index), dtype, device, quantization.is_any)
            for index in self.own.layers
        ]
        self.inv_freq = inverse_frequencies(config.rope, config.head_dim).to(device)
        self._vocab_widths = tuple(len(part(config.vocab_size, shard.parallel.tp_size, t)) for t in range(shard.parallel.tp_size))
        if shard.is_first_stage:
            self.embedding = torch.empty(len(self.own.vocab), config.hidden_size, dtype=dtype, device=device)
            self.norm = torch.empty(config.hidden_size, dtype=dtype, device=device)
            self.head: Any = self.embedding if config.tie_word_embeddings else torch.empty_like(self.embedding)
            if not config.tie_word_embeddings and quantization.bits("lm_head"):
                self.head = GrowingMatrix(len(self.own.vocab), config.hidden_size, device)

    def slots(self) -> dict[str, Target]:
        """Every tensor of a Hugging Face checkpoint of these families that this rank holds a part of, and where it goes."""
        config, own = self.config, self.own
        slots: dict[str, Target] = {}
        dim = config.head_dim
        sizes = [len(heads) * dim for heads in (own.q_heads, own.kv_heads, own.kv_heads)]
        q_start, kv_start = own.q_heads.start * dim, own.kv_heads.start * dim

        def pairs(tensor: Tensor) -> Tensor:
            """Rows i and i + head_dim / 2 of each head become rows 2i and 2i + 1."""
            heads = torch.unflatten(tensor, 0, (-1, 2, dim // 2))
            return heads.transpose(1, 2).flatten(0, 2)

        for index, layer in zip(own.layers, self.layers, strict=True):
            at = f"model.layers.{index}."
            slots[at + "input_layernorm.weight"] = Slot(layer.attention_norm)
            slots[at + "post_attention_layernorm.weight"] = Slot(layer.mlp_norm)
            first = 0
            for name, count, arrange, start, heads in (
                ("q_proj", sizes[0], pairs, q_start, config.num_heads),
                ("k_proj", sizes[1], pairs, kv_start, config.num_kv_heads),
                ("v_proj", sizes[2], None, kv_start, config.num_kv_heads),
            ):
                part: dict[str, Any] = {"arrange": arrange, "start": start, "total": heads * dim}
                slots |= self._rows(f"{at}self_attn.{name}", layer.qkv, first, count, **part)
                if layer.qkv_bias is not None:
                    slots[f"{at}self_attn.{name}.bias"] = Slot(layer.qkv_bias[first : first + count], **part)
                first += count
            inner: dict[str, Any] = {"start": own.inner.start, "total": config.intermediate_size}
            width = len(own.inner)
            for name, first in (("gate_proj", 0), ("up_proj", width)):
                slots |= self._rows(f"{at}mlp.{name}", layer.gate_up, first, width, **inner)
                if layer.gate_up_bias is not None:
                    slots[f"{at}mlp.{name}.bias"] = Slot(layer.gate_up_bias[first : first + width], **inner)
            hidden = config.hidden_size
            slots |= self._rows(at + "self_attn.o_proj", layer.o, 0, hidden, axis=1, start=q_start, total=config.num_heads * dim)
            slots |= self._rows(at + "mlp.down_proj", layer.down, 0, hidden, axis=1, **inner)
            for name, tensor, arrange in (
                ("self_attn.o_proj.bias", layer.o_bias, None),
                ("self_attn.q_norm.weight", layer.q_norm, pairs),
                ("self_attn.k_norm.weight", layer.k_norm, pairs),
                ("mlp.down_proj.bias", layer.down_bias, None),
            ):
                if tensor is not None:
                    slots[at + name] = Slot(tensor, arrange)
        if self.shard.is_first_stage:
            vocab: dict[str, Any] = {"start": own.vocab.start, "total": config.vocab_size}
            slots["model.embed_tokens.weight"] = Slot(self.embedding, **vocab)
            slots["model.norm.weight"] = Slot(self.norm)
            if self.head is not self.embedding:
                slots |= self._rows("lm_head", self.head, 0, len(own.vocab), **vocab)
        return slots

    def _rows(self, module: str, matrix: Tensor | GrowingMatrix, at: int, count: int, **part: Any) -> dict[str, Target]:
        """The tensors of a linear module whose weight is rows [at, at + count) of a matrix; part: as in Slot."""
        if isinstance(matrix, Tensor):
            return {f"{module}.weight": Slot(matrix[at : at + count], **part)}
        into, bits = Rows(matrix, at, count, **part), self.quantization.bits(module)
        if bits and self.quantization.stored is not None:
            return dict(StoredRows(module, into, self.quantization.stored).targets())
        return {f"{module}.weight": RoundedRows(into, bits, self._dtype)}

    def pack(self) -> None:
        """Once the slots are filled: every matrix into the layout its device multiplies fastest, one after the other.

        A head that is tied to the embedding becomes a matrix of its own: rows of a packed one cannot be looked up. Quantised ones
        have been packed as they came.
        """

        def packed(matrix: Any) -> ops.Matrix:
            if isinstance(matrix, GrowingMatrix):
                assert matrix.finished is not None
                return matrix.finished
            return ops.pack(matrix)

        for layer in self.layers:
            for name in ("qkv", "o", "gate_up", "down"):
                setattr(layer, name, packed(getattr(layer, name)))
        if self.shard.is_first_stage:
            if self.head is self.embedding and self.quantization.rounded:
                self.head = pack([quantize(self.embedding, self.quantization.bits("lm_head"))])
            else:
                self.head = packed(self.head)

    def weight_nbytes(self) -> int:
        """Memory of this rank's parameters."""
        held: dict[int, Any] = {}
        for holder, names in ((self, ("embedding", "norm", "head")), *((layer, Layer.__slots__) for layer in self.layers)):
            held |= {id(value): value for name in names if (value := getattr(holder, name, None)) is not None and name != "window"}
        return sum(value.numel() * value.itemsize if isinstance(value, Tensor) else value.nbytes for value in held.values())

    def embed(self, batch: ForwardBatch) -> Tensor:
        """[num_tokens, hidden_size]. A token outside of this rank's rows is zero here, and what it is on one other rank."""
        vocab = self.own.vocab
        if len(vocab) == self.config.vocab_size:
            return torch.embedding(self.embedding, batch.token_ids)
        ids = batch.token_ids - vocab.start
        elsewhere = (ids < 0) | (ids >= len(vocab))
        rows = torch.embedding(self.embedding, ids.masked_fill_(elsewhere, 0))
        return self.ranks.all_reduce(rows.masked_fill_(elsewhere[:, None], 0.0))

    def new_hidden(self, num_rows: int) -> Tensor:
        return torch.empty(num_rows, self.config.hidden_size, dtype=self._dtype, device=self._device)

    def forward(self, batch: ForwardBatch, hidden: Tensor, kv: Tensor, on_layer: OnLayer | None = None) -> Tensor:
        """Hidden states before the last norm, [num_tokens, hidden_size]."""
        config = self.config
        num_tokens = batch.token_ids.shape[0]
        num_heads, num_kv_heads = len(self.own.q_heads), len(self.own.kv_heads)
        q_width = num_heads * config.head_dim
        scale = config.head_dim**-0.5
        eps = config.rms_norm_eps
        turn = ops.rotation(batch.positions, self.inv_freq)
        for index, layer in enumerate(self.layers):
            kv_layer = kv[index]
            qkv = ops.linear(ops.rms_norm(hidden, layer.attention_norm, eps), layer.qkv, layer.qkv_bias)
            norms = None if layer.q_norm is None or layer.k_norm is None else (layer.q_norm, layer.k_norm)
            ops.rotate_and_write(qkv, num_heads, num_kv_heads, turn, norms, eps, kv_layer, batch.attention)
            if on_layer is not None:
                on_layer(index)
            q = qkv[:, :q_width].view(num_tokens, num_heads, config.head_dim)
            rows = qkv[:, q_width:].view(num_tokens, 2, num_kv_heads, config.head_dim)
            attended = ops.attention(q, rows, kv_layer, batch.attention, scale, layer.window)
            residual = hidden if self._adds else None
            hidden = self.ranks.all_reduce(ops.linear(attended, layer.o, layer.o_bias, residual))
            inner = ops.linear(ops.rms_norm(hidden, layer.mlp_norm, eps), layer.gate_up, layer.gate_up_bias)
            residual = hidden if self._adds else None
            hidden = self.ranks.all_reduce(ops.linear(ops.silu_mul(inner), layer.down, layer.down_bias, residual))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor | None:
        own = ops.linear(ops.rms_norm(hidden, self.norm, self.config.rms_norm_eps), self.head)
        logits = self.ranks.gather(own, self._vocab_widths)
        return None if logits is None else logits.float()


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """float32 [head_dim / 2]. "llama3" is Llama 3.1's rule: long wavelengths slowed by factor, a blend in between."""
    inv_freq = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    if rope.kind == "linear":
        return inv_freq / rope.factor
    if rope.kind == "llama3":
        context = rope.original_max_position_embeddings
        wavelength = 2 * math.pi / inv_freq
        slowed = inv_freq / rope.factor
        span = rope.high_freq_factor - rope.low_freq_factor
        smooth = (context / wavelength - rope.low_freq_factor) / span
        blend = (1 - smooth) * slowed + smooth * inv_freq
        inv_freq = torch.where(wavelength > context / rope.low_freq_factor, slowed, inv_freq)
        between = (wavelength <= context / rope.low_freq_factor) & (wavelength >= context / rope.high_freq_factor)
        inv_freq = torch.where(between, blend, inv_freq)
    return inv_freq
