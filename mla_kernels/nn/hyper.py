"""Hyper-connections as modules, with the weight names of Hugging Face's models and of DeepSeek's files.

Symbols: N streams, H hidden size.
"""

import torch
from torch import nn

from mla_kernels.checks import check_choice, check_int, check_tensor
from mla_kernels.hyper.form import MOST_STREAMS, SINKHORN, HyperForm, StreamMix
from mla_kernels.hyper.op import hyper_head, hyper_post, hyper_post_pre, hyper_pre
from mla_kernels.nn.loading import dequantise_state
from mla_kernels.nn.precision import KeepsFloat32

PARTS = ("fn", "base", "scale")
OF_MODEL = {"deepseek_v4": StreamMix.SINKHORN, "glm5_next_text": StreamMix.SINKHORN, "hy_v4": StreamMix.IDENTITY}
"""``config.model_type`` -> what its layers do with the streams."""


def _sizes_of(config) -> tuple[int, int, HyperForm]:
    check_choice("config.model_type", config.model_type, tuple(OF_MODEL))
    return config.hidden_size, config.hc_mult, form_of(config)


def form_of(config) -> HyperForm:
    """Of a configuration of transformers."""
    own = {"eps": config.hc_eps, "norm_eps": config.rms_norm_eps}
    if OF_MODEL[config.model_type] is StreamMix.IDENTITY:
        return HyperForm(StreamMix.IDENTITY, magnitude=config.hc_magnitude, **own)
    return HyperForm(iterations=max(1, config.hc_sinkhorn_iters), **own)


class _Weights(KeepsFloat32):
    """fn, base and scale in fp32, and the streams' shape."""

    prefix = ""  # of the parameters' names
    published: tuple[str, ...] = ()  # and of theirs in DeepSeek's files

    def __init__(self, hidden_size, num_streams, form, rows, scales):
        super().__init__()
        check_int("hidden_size", hidden_size, 1)
        check_int("num_streams", num_streams, 1, MOST_STREAMS)
        if not isinstance(form, HyperForm):
            raise TypeError(f"form: got {type(form).__name__}, a HyperForm is accepted")
        self.hidden_size, self.num_streams, self.form = hidden_size, num_streams, form
        if rows:
            fn = torch.empty(rows, num_streams * hidden_size, dtype=torch.float32).normal_(0, 0.02)
            values = fn, torch.zeros(rows, dtype=torch.float32), torch.ones(scales, dtype=torch.float32)
            for part, value in zip(PARTS, values):
                self.register_parameter(self.prefix + part, nn.Parameter(value))
        self.register_load_state_dict_pre_hook(_rename)
        self.register_load_state_dict_pre_hook(dequantise_state)

    def _flat(self, streams):
        check_tensor("streams", streams)
        leading = (None,) * max(0, streams.dim() - 2)
        check_tensor("streams", streams, shape=(*leading, self.num_streams, self.hidden_size))
        return streams.reshape(-1, self.num_streams, self.hidden_size), streams.shape[:-2]


def _rename(module, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    """Before ``load_state_dict``: DeepSeek's names become the parameters'. Names of two modules are refused."""
    found = [name for name in module.published if any(f"{prefix}{name}_{part}" in state_dict for part in PARTS)]
    if len(found) > 1:
        errors.append(f"{prefix or 'state_dict'}: got weights named {found[0]}_* and {found[1]}_*, one is accepted")
        return
    for name in found:
        for part in PARTS:
            source, target = f"{prefix}{name}_{part}", f"{prefix}{module.prefix}{part}"
            if source in state_dict and target not in state_dict:
                state_dict[target] = state_dict.pop(source)


class HyperConnection(_Weights):
    """What stands around one layer of a model with N residual streams: attention or feed-forward.

    Parameters ``fn``, ``base`` and ``scale`` in fp32, as Hugging Face's ``DeepseekV4HyperConnection`` has them, which
    stay so in ``to(torch.bfloat16)``. ``load_state_dict`` also takes DeepSeek's names, ``hc_attn_fn`` or ``hc_ffn_fn``
    and so on, of one of the two.

        collapsed, post, comb = attn_hc(streams, norm_weight=input_layernorm.weight)
        streams, collapsed, post, comb = ffn_hc.step(streams, attention(collapsed), post, comb, ffn_norm.weight)
        streams = ffn_hc.write(streams, mlp(collapsed), post, comb)

    Args:
        hidden_size: H.
        num_streams: N, 1 to 4.
        form: the model's constants, :class:`mla_kernels.HyperForm`.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    published = ("hc_attn", "hc_ffn")

    def __init__(self, hidden_size: int, num_streams: int = 4, form: HyperForm = SINKHORN):
        rows, scales = (form.rows(num_streams), form.scales) if isinstance(form, HyperForm) else (0, 0)
        super().__init__(hidden_size, num_streams, form, rows, scales)

    @classmethod
    def from_hf(cls, config) -> "HyperConnection":
        """Of a transformers configuration of DeepSeek-V4, HY-V4 or (its ``text_config``) GLM-5-next."""
        return cls(*_sizes_of(config))

    def forward(
        self, streams: torch.Tensor, norm_weight: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What the layer reads of streams [..., N, H]: (collapsed [..., H], post [..., N], comb [..., N, N] or None).

        ``norm_weight`` [H]: that of the layer's norm, which is applied then.
        """
        flat, shape = self._flat(streams)
        weights = self.fn, self.base, self.scale
        return _shaped(hyper_pre(flat, *weights, form=self.form, norm_weight=norm_weight), shape)

    def write(
        self, streams: torch.Tensor, out: torch.Tensor, post: torch.Tensor, comb: torch.Tensor | None
    ) -> torch.Tensor:
        """The streams [..., N, H] behind the layer that gave ``out`` [..., H], with this module's post and comb."""
        flat, shape = self._flat(streams)
        return hyper_post(flat, *_flattened(out, post, comb)).view(*shape, *flat.shape[1:])

    def step(
        self,
        streams: torch.Tensor,
        out: torch.Tensor,
        post: torch.Tensor,
        comb: torch.Tensor | None,
        norm_weight: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """``write`` of the layer before, whose post and comb these are, then this one's ``forward``, in two launches:
        (streams, collapsed, post, comb)."""
        flat, shape = self._flat(streams)
        weights = self.fn, self.base, self.scale
        results = hyper_post_pre(
            flat, *_flattened(out, post, comb), *weights, form=self.form, norm_weight=norm_weight
        )  # fmt: skip
        return _shaped(results, shape)


class HyperHead(_Weights):
    """The N streams behind the last layer as one.

    Parameters ``hc_fn``, ``hc_base`` and ``hc_scale`` in fp32, as Hugging Face's ``DeepseekV4HyperHead`` has them;
    ``load_state_dict`` also takes DeepSeek's ``hc_head_fn`` and so on. With ``collapse="mean"`` (GLM-5-next) there are
    none.

    Args:
        hidden_size, num_streams, form: as of :class:`HyperConnection`.
        collapse: "sigmoid" or "mean", as of :func:`mla_kernels.hyper_head`.

    Raises:
        TypeError, ValueError: an argument that is not accepted.
    """

    prefix, published = "hc_", ("hc_head",)

    def __init__(
        self, hidden_size: int, num_streams: int = 4, form: HyperForm = SINKHORN, *, collapse: str = "sigmoid"
    ):
        check_choice("collapse", collapse, ("sigmoid", "mean"))
        super().__init__(hidden_size, num_streams, form, num_streams if collapse == "sigmoid" else 0, 1)
        self.collapse = collapse

    @classmethod
    def from_hf(cls, config) -> "HyperHead":
        """As :meth:`HyperConnection.from_hf`."""
        collapse = "mean" if config.model_type == "glm5_next_text" else "sigmoid"
        return cls(*_sizes_of(config), collapse=collapse)

    def forward(self, streams: torch.Tensor, norm_weight: torch.Tensor | None = None) -> torch.Tensor:
        """[..., N, H] to [..., H]. ``norm_weight`` [H]: that of the model's last norm, which is applied then."""
        flat, shape = self._flat(streams)
        weights = () if self.collapse == "mean" else (self.hc_fn, self.hc_base, self.hc_scale)
        row = hyper_head(flat, *weights, collapse=self.collapse, form=self.form, norm_weight=norm_weight)
        return row.view(*shape, self.hidden_size)


def _flattened(out, post, comb):
    return out.flatten(0, -2), post.flatten(0, -2), None if comb is None else comb.flatten(0, -3)


def _shaped(results, shape):
    return tuple(None if x is None else x.view(*shape, *x.shape[1:]) for x in results)
