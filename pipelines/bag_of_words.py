"""A text encoder that is linear in the words of a caption, so that it generalizes from few captions.

Importing this module registers it with transformers: `AutoModel.from_pretrained` and pipelines load it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, initialization
from transformers.modeling_outputs import BaseModelOutput


class BagOfWordsConfig(PreTrainedConfig):
    """Sizes of a `BagOfWordsModel`.

    Args:
        vocab_size: number of tokens V.
        hidden_size: size of the embedding C.
        kwargs: of `PreTrainedConfig`.
    """

    model_type = "bag_of_words"

    def __init__(self, vocab_size: int = 2, hidden_size: int = 64, pad_token_id: int = 0, **kwargs: Any) -> None:
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        super().__init__(pad_token_id=pad_token_id, **kwargs)


class BagOfWordsModel(PreTrainedModel):
    """Embeds the set of a caption's words, whatever their order; all tokens of a caption have the same embedding.

    A caption is the vector of the weights of its words, of unit length; this is projected to C values, which are of
    unit length again. Words of weight 0 count as absent. In evaluation mode the values are multiplied by `shrinkage`
    before, so that directions that are fitted to the captions of the training count less for other captions.
    """

    config_class = BagOfWordsConfig
    main_input_name = "input_ids"

    def __init__(self, config: BagOfWordsConfig) -> None:
        super().__init__(config)
        self.word_weights = nn.Parameter(torch.zeros(config.vocab_size))
        self.projection = nn.Linear(config.vocab_size, config.hidden_size)
        self.shrinkage = nn.Parameter(torch.ones(config.hidden_size))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Transformers' method for weights that a checkpoint lacks, as those of earlier versions lack `shrinkage`."""
        super()._init_weights(module)
        if module is self:
            initialization.zeros_(self.word_weights)
            initialization.ones_(self.shrinkage)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> BaseModelOutput:
        """Embed token ids (B, N), where the mask (B, N) is not 0: `last_hidden_state` is (B, N, C)."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, self.config.pad_token_id)
        bags = self.word_weights.new_zeros(len(input_ids), self.config.vocab_size)
        bags = bags.scatter(1, input_ids, self.word_weights[input_ids])
        embeddings = self.projection(F.normalize(bags, dim=1))
        embeddings = F.normalize(embeddings if self.training else embeddings * self.shrinkage, dim=1)
        return BaseModelOutput(last_hidden_state=embeddings[:, None].expand(-1, input_ids.shape[1], -1))


AutoConfig.register(BagOfWordsConfig.model_type, BagOfWordsConfig)
AutoModel.register(BagOfWordsConfig, BagOfWordsModel)
