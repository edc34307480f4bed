"""What LoRA files call the layers of BERT: the names of `transformers.BertModel`, with or without `bert.` in front."""

from functools import partial

from torch import nn

from reference_ports.bert.convert import BERT_KEYS, ENCODER_KEYS, SENTENCE_ENCODER_KEYS
from reference_ports.bert.model import BERT, BERTEncoder, SentenceEncoder, bert_base, bert_large, minilm_l6
from refiners.conversion import KeyMap
from refiners.conversion.loras import LoraNames, LoraTarget, register


def lora_names(model: nn.Module, keys: KeyMap) -> LoraNames:
    """The names of the layers of BERT."""
    return LoraNames.of(model, keys, title=keys.name)


TARGETS = (
    LoraTarget(
        title="BERT",
        tree=BERT,
        names=partial(lora_names, keys=BERT_KEYS),
        published={"BERT base": bert_base, "BERT large": bert_large},
    ),
    LoraTarget(title="BERT", tree=BERTEncoder, names=partial(lora_names, keys=ENCODER_KEYS), published={}),
    LoraTarget(
        title="a sentence encoder",
        tree=SentenceEncoder,
        names=partial(lora_names, keys=SENTENCE_ENCODER_KEYS),
        published={"all-MiniLM-L6-v2": minilm_l6},
    ),
)
register(*TARGETS)
