"""The text encoder, CLIP's text model: turns a prompt into one vector per token. Stages B and C get these vectors.

  prompt -Tokenizer-> ids (B,77), mask (B,77) -CLIPTextModel-> (B,77,D)

D is 1280 for Stage C (CLIP-bigG, 32 layers), 1024 for Stage B (CLIP-H, 24 layers). Both are GPT-like models: each
token attends to itself and to earlier tokens. CLIP was trained to make one vector per caption similar to its image's
vector; Stages B and C use the vectors of all tokens. Submodules have the same names as in the published weights.
Paper: arXiv:2103.00020.  Needs: torch, tokenizers.
"""
import json
import warnings
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from loading.files import TOKENIZER_FILES as FILES
from speed.memory import to_device

START, END = "<|startoftext|>", "<|endoftext|>"
USUAL = dict(tokenizer_class="CLIPTokenizer", bos_token=START, eos_token=END, pad_token=END, unk_token=END)
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


# ----- text -> token ids ---------------------------------------------------------------------------------------------

def byte_pair_encoding(vocabulary: dict[str, int], merges: list[tuple[str, str]]):
    """Builds CLIP's tokenizer. It splits lowercase words into bytes, then merges pairs in the order of `merges`."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>", unk_token=END))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(WORDS), "removed", invert=True),
                                                       pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, vocabulary[END]), (START, vocabulary[START]),
                                                            trim_offsets=False, add_prefix_space=False)
    return tokenizer


class Tokenizer:
    """Splits n texts into tokens. Returns ids (n,N) and a mask (n,N), which is 1 at tokens and 0 at padding.
    bpe: a tokenizers.Tokenizer. config: tokenizer_config.json; only its pad_token and model_max_length (N) are used."""
    def __init__(self, bpe, config: dict):
        self.bpe, self.config, self.length = bpe, USUAL | config, int(config.get("model_max_length", 77))
        bpe.no_padding()                  # tokenizer.json may turn on padding and truncation; here __call__ does both
        bpe.no_truncation()
        pad = self.config["pad_token"]
        self.pad = bpe.token_to_id(pad["content"] if isinstance(pad, dict) else pad)
        if self.pad is None:
            raise ValueError(f"pad_token is {pad}, expected one of its {bpe.get_vocab_size()} tokens")

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Loads a folder's tokenizer from tokenizer.json, or if it is missing, from vocab.json and merges.txt."""
        import tokenizers
        found = {name: (Path(folder) / name).read_text("utf-8") for name in FILES if (Path(folder) / name).is_file()}
        config = json.loads(found.get("tokenizer_config.json", "{}"))
        if "added_tokens_decoder" not in config:        # in older formats, another file has the special tokens
            config |= json.loads(found.get("special_tokens_map.json", "{}"))
        if "tokenizer.json" in found:
            return cls(tokenizers.Tokenizer.from_str(found["tokenizer.json"]), config)
        lines = [line.split() for line in found["merges.txt"].splitlines() if line and not line.startswith("#version")]
        return cls(byte_pair_encoding(json.loads(found["vocab.json"]), [(a, b) for a, b in lines]), config)

    def files(self) -> dict[str, str]:
        """Returns {name: content} of the files in which transformers stores this tokenizer."""
        config = json.dumps(self.config, indent=2, sort_keys=True)
        return {"tokenizer.json": self.bpe.to_str(pretty=True), "tokenizer_config.json": f"{config}\n"}

    def __call__(self, texts: list[str], length: int | None = None) -> tuple[Tensor, Tensor]:
        """Converts n texts to ids and mask, each (n,N). N: length, at most model_max_length. Warns if a text is cut."""
        length = min(length or self.length, self.length)
        ids, mask = torch.full((len(texts), length), self.pad), torch.zeros(len(texts), length, dtype=torch.long)
        for i, text in enumerate(texts):
            found = self.bpe.encode(text)
            tokens = found.ids[:-1][:length - 1] + found.ids[-1:]         # a text that is cut off also ends with END
            if len(tokens) < len(found):
                warnings.warn(f"a prompt is longer than the {length} tokens that the text encoder takes; this part "
                              f"was cut off: {text[found.offsets[length - 1][0]:]!r}")
            ids[i, :len(tokens)], mask[i, :len(tokens)] = torch.tensor(tokens), 1
        return ids, mask


# ----- the network ---------------------------------------------------------------------------------------------------

ACTIVATIONS = dict(gelu=F.gelu, quick_gelu=lambda x: x * torch.sigmoid(1.702 * x))       # OpenAI's CLIP has quick_gelu


class Attention(nn.Module):
    """Self-attention on x (B,N,D). visible (B,1,N,N): visible[b,0,i,j] is True if token i attends to token j."""
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for layer in (self.q_proj, self.k_proj, self.v_proj))            # (B, heads, N, D / heads)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: str, eps: float):
        super().__init__()
        self.self_attn, self.activation = Attention(width, heads), ACTIVATIONS[activation]
        self.layer_norm1, self.layer_norm2 = (nn.LayerNorm(width, eps) for _ in range(2))
        self.mlp = nn.ModuleDict(dict(fc1=nn.Linear(width, hidden), fc2=nn.Linear(hidden, width)))

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x), visible)
        return x + self.mlp.fc2(self.activation(self.mlp.fc1(self.layer_norm2(x))))


class CLIPTextModel(nn.Module):
    """CLIP's text transformer: ids and mask, each (B,N) -> (B,N,D). Arguments: config.json's keys; ignores others."""
    def __init__(self, vocab_size: int = 49408, hidden_size: int = 512, intermediate_size: int = 2048,
                 num_hidden_layers: int = 12, num_attention_heads: int = 8, max_position_embeddings: int = 77,
                 hidden_act: str = "quick_gelu", layer_norm_eps: float = 1e-5, **_):
        super().__init__()
        self.config = {name: value for name, value in locals().items() if name not in ("self", "_", "__class__")}
        if hidden_size % num_attention_heads:
            raise ValueError(f"hidden_size {hidden_size} is not a multiple of its {num_attention_heads} heads")
        self.embeddings = nn.ModuleDict(dict(token_embedding=nn.Embedding(vocab_size, hidden_size),
                                             position_embedding=nn.Embedding(max_position_embeddings, hidden_size)))
        self.encoder = nn.ModuleDict(dict(layers=nn.ModuleList(
            Layer(hidden_size, num_attention_heads, intermediate_size, hidden_act, layer_norm_eps)
            for _ in range(num_hidden_layers))))
        self.final_layer_norm = nn.LayerNorm(hidden_size, layer_norm_eps)
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(weight)
            elif weight.ndim == 2:                                # CLIP's initialization
                std = {"embedding": 0.02, "fc1": (2 * hidden_size) ** -0.5, "out_proj": hidden_size ** -0.5}
                nn.init.normal_(weight, std=next((std[part] for part in std if part in name),
                                                 (2 * hidden_size * num_hidden_layers) ** -0.5))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embeddings.token_embedding(ids) + self.embeddings.position_embedding.weight[:ids.shape[1]]
        before = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()        # (N, N)
        visible = before & mask[:, None, None].bool()                                                 # (B, 1, N, N)
        for layer in self.encoder.layers:
            x = layer(x, visible)
        return self.final_layer_norm(x)


class TextEncoder(nn.Module):
    """A tokenizer and a text model: n prompts -> (n,N,D). Stages B and C also attend to vectors of padding tokens."""
    def __init__(self, tokenizer: Tokenizer, model: CLIPTextModel):
        super().__init__()
        self.tokenizer, self.model = tokenizer, model

    def tokens(self, prompts: list[str]) -> tuple[Tensor, Tensor]:              # ids and mask, on the model's device
        places = self.model.embeddings.position_embedding.weight                                          # (N, D)
        return tuple(to_device(tensor, places.device) for tensor in self.tokenizer(prompts, len(places)))

    def forward(self, prompts: list[str]) -> Tensor:
        return self.model(*self.tokens(prompts))
