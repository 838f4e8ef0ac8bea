"""Prompts in every layer: prefix tuning and P-tuning v2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fusetune.methods.prompts.config import PromptConfig, prompt_kind

SITES = ("encoder", "decoder", "cross")


@dataclass
class DeepPromptConfig(PromptConfig):
    """Keys and values that every layer's attention sees before its own, trained.

    Real tokens have the positions P, P + 1, ...; the attention mask and the labels stay as they
    are.

    Args:
        prefix_projection: an MLP makes the prefix: embedding [P, hidden size], linear to
            encoder_hidden_size, tanh, linear to the keys and values of all layers. It is dropped
            when the adapter is saved: a file holds the prefix itself, and so does an adapter that
            is loaded, for inference or for more training.
        encoder, decoder, cross: in encoder-decoder models, whether the encoder's self-attention,
            the decoder's and the cross-attention each have a prefix of their own. Other models
            have one self-attention, and these must be left.
    """

    prefix_projection: bool = False
    encoder_hidden_size: int = 512
    encoder: bool | None = None
    decoder: bool | None = None
    cross: bool | None = None
    deep: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length()
        self._check_size("encoder_hidden_size")

    def sites(self, present: tuple[str, ...]) -> list[str]:
        """Which of a model's attention sites get a prefix; present: those the model has.

        ("self",) for a model of one stack. Raises ValueError.
        """
        asked = {name: getattr(self, name) for name in SITES}
        if present == ("self",):
            given = [name for name, value in asked.items() if value is not None]
            if given:
                raise ValueError(
                    f"{given[0]} is for encoder-decoder models: leave it out for this model"
                )
            return ["self"]
        sites = [name for name in present if asked[name] is not False]
        if not sites:
            raise ValueError("one of encoder, decoder and cross must be true")
        return sites

    @property
    def prefix_dropout(self) -> float:
        """Probability that an element of the prefix is dropped in training."""
        return 0.0


@prompt_kind
@dataclass
class PrefixTuningConfig(DeepPromptConfig):
    """Prefix tuning (Li and Liang 2021).

    Args:
        prefix_projection: see DeepPromptConfig; on by default, as in the paper.
        init_weights: "random": standard normal; "zero": keys and values of zero; "text": real
            words run through the frozen model, whose keys and values the prefix begins as. Fewer
            words than num_virtual_tokens are repeated, more are cut. Without prefix_projection.
        init_text, or init_token_ids: the words of init_weights="text".
    """

    kind: str = "prefix_tuning"
    prefix_projection: bool = True
    init_weights: str = "random"
    init_text: str | None = None
    init_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_of("init_weights", ("random", "zero", "text"))
        if self.init_weights != "text":
            return
        if self.prefix_projection:
            raise ValueError(
                'init_weights="text" needs prefix_projection=False: the MLP cannot be made to '
                "give the words' keys and values"
            )
        self._check_needs('init_weights="text"', "init_text", "init_token_ids")


@prompt_kind
@dataclass
class PTuningV2Config(DeepPromptConfig):
    """P-tuning v2 (Liu et al. 2022): deep prompts without reparametrisation, with prompt dropout.

    Args:
        prompt_dropout: probability that an element of the prefix is dropped, independently for
            each sequence of the batch, in training.
        prefix_projection: the MLP, which the paper uses for some tasks.
    """

    kind: str = "p_tuning_v2"
    prompt_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_probability("prompt_dropout")

    @property
    def prefix_dropout(self) -> float:
        return self.prompt_dropout
