"""Prompts among the input embeddings: prompt tuning and P-tuning (v1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fusetune.methods.prompts.config import PromptConfig, prompt_kind
from fusetune.methods.prompts.template import Template

PROMPT_INITS = ("uniform", "sampled_vocab", "class_labels", "text", "file")


@prompt_kind
@dataclass
class PromptTuningConfig(PromptConfig):
    """Prompt tuning (Lester et al. 2021): P trained embeddings in front of the input's.

    The result has P positions more than the input; labels get -100 there.

    Args:
        init: where the embeddings begin.
            "uniform": uniform in [-init_range, init_range].
            "sampled_vocab": the embeddings of init_vocab_size tokens' sample without replacement;
                the lowest ids, which are the commonest tokens in vocabularies sorted by frequency,
                or init_token_ids.
            "class_labels": the mean embedding of each label's tokens, in order; what is left of
                the prompt is sampled as by "sampled_vocab".
            "text": the embeddings of init_text's tokens, repeated or cut to P; or init_token_ids.
            "file": the tensor [P, hidden size] of a safetensors file, init_file; where it holds
                several, the one named init_file_key.
        class_labels: texts of "class_labels".
        init_seed: makes a random initialisation reproducible.
    """

    kind: str = "prompt_tuning"
    init: str = "sampled_vocab"
    init_range: float = 0.5
    init_vocab_size: int = 5000
    init_token_ids: list[int] | None = None
    class_labels: list[str] | None = None
    init_text: str | None = None
    init_file: str | None = None
    init_file_key: str | None = None
    init_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_length()
        self._check_one_of("init", PROMPT_INITS)
        self._check_size("init_vocab_size")
        if not self.init_range > 0:
            raise ValueError(f"init_range must be positive, got {self.init_range}")
        if self.init == "class_labels":
            self._check_labels()
        elif self.init == "text":
            self._check_needs('init="text"', "init_text", "init_token_ids")
        elif self.init == "file" and self.init_file is None:
            raise ValueError('init="file" needs init_file')

    def _check_labels(self) -> None:
        labels = self.class_labels
        if not labels or isinstance(labels, str) or not all(isinstance(x, str) for x in labels):
            raise ValueError(f'init="class_labels" needs a list of class_labels, got {labels!r}')
        if len(labels) > self.length:
            raise ValueError(
                f"class_labels: {len(labels)} labels for num_virtual_tokens={self.length}"
            )
        if self.tokenizer_name_or_path is None:
            raise ValueError('init="class_labels" needs tokenizer_name_or_path')


@prompt_kind
@dataclass
class PTuningConfig(PromptConfig):
    """P-tuning, version 1 (Liu et al. 2021): trained pseudo-tokens at a template's places.

    Their embeddings are encoded by a two-layer bidirectional LSTM and an MLP, or by an MLP. The
    encoder is dropped when the adapter is saved: a file holds its output.

    Args:
        template: a list of how many pseudo-tokens go where. `[3, 3, 3]`: three before the first
            slot, three between the slots, three behind the second. Or with everything written
            out: numbers of pseudo-tokens, "{0}", "{1}", ... for the slots, and anchors, real
            tokens that stay as they are: texts, or lists of token ids. `[2, "{0}", "Question:",
            "{1}", 1]`. Default: num_virtual_tokens before the one slot.
            A template with one slot goes around each row of a batch by itself. With more slots the
            input has the pseudo-tokens, as `fill` makes it.
        num_virtual_tokens: with a template, its number of pseudo-tokens; may be left out.
        pseudo_token_id: stands for pseudo-tokens in input ids; default: the first id behind the
            model's vocabulary.
        encoder_reparameterization_type: "LSTM" or "MLP".
        encoder_hidden_size: of the LSTM in each direction, default half the model's hidden size;
            of the MLP, default the model's hidden size.
        encoder_num_layers, encoder_dropout: of the LSTM.
    """

    kind: str = "p_tuning"
    template: list[Any] | None = field(default=None)
    pseudo_token_id: int | None = None
    encoder_reparameterization_type: str = "LSTM"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_one_of("encoder_reparameterization_type", ("LSTM", "MLP"))
        self._check_size("encoder_num_layers")
        self._check_probability("encoder_dropout")
        if self.encoder_hidden_size is not None:
            self._check_size("encoder_hidden_size")
        if self.template is None:
            self._check_length()
            self.template = [self.num_virtual_tokens, "{0}"]
        count = Template.parse(self.template).count
        self.template = list(self.template)
        if self.num_virtual_tokens not in (None, count):
            raise ValueError(
                f"num_virtual_tokens is {self.num_virtual_tokens}, but the template has {count}"
            )
        self.num_virtual_tokens = count
        self._check_length()
        texts = [part for part in self.parsed.parts if isinstance(part, str)]
        if texts and self.tokenizer_name_or_path is None:
            raise ValueError(f"template: the anchor {texts[0]!r} needs tokenizer_name_or_path")

    @property
    def parsed(self) -> Template:
        """The template, checked."""
        return Template.parse(self.template or ())

    def fill(self, slots: Sequence[Sequence[int]]) -> list[int]:
        """The ids of an input: the template with slots[i], token ids, in slot i.

        For a config that is in a model, which knows ids for anchors and pseudo-tokens. Labels of
        such an input are as long as it is. Raises ValueError.
        """
        if self.pseudo_token_id is None:
            raise ValueError("pseudo_token_id: give it, or put the config into a model first")
        return self.parsed.fill(slots, self.pseudo_token_id)
