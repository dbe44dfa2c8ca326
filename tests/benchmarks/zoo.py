"""Count the residual blocks of other packages' networks, against counts made from their configurations by hand.

    python -m tests.benchmarks.zoo [WORD …] [--write FILE]      zoo.txt beside this holds the last whole table

With words only the networks whose names hold one of them. It needs torchvision, timm and transformers, with
random weights; put them in a folder of their own (pip install --no-deps --target SITE …) on PYTHONPATH.
"""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from typing import Any

import torch

from resode.analysis.depth.tracing import trace


def beside_cpu_torch() -> None:
    """torchvision's compiled operators may not load beside this torch; its classifiers need none of them."""
    declare = torch.library.register_fake

    def tolerant(op: Any, *args: Any, **kwargs: Any) -> Any:
        return (lambda f: f) if str(op).startswith("torchvision::") else declare(op, *args, **kwargs)

    torch.library.register_fake = tolerant
    try:
        importlib.import_module("torchvision")
    finally:
        torch.library.register_fake = declare


def torchvision(name: str, *, size: int = 64, frames: int = 0, part: str = "models", **options: Any) -> tuple:
    """A network of torchvision and an input."""
    make = getattr(importlib.import_module(f"torchvision.{part}"), name)
    shape = (1, 3, frames, size, size) if frames else (1, 3, size, size)
    return make(weights=None, **options), torch.randn(shape)


def timm(name: str, *, size: int = 64, **options: Any) -> tuple:
    """A network of timm and an input."""
    return importlib.import_module("timm").create_model(name, pretrained=False, **options), torch.randn(
        1, 3, size, size
    )


def transformers(name: str, *, inputs: str = "ids", model: str = "Model", **config: Any) -> tuple:
    """A network of transformers, small, and an input."""
    package = importlib.import_module("transformers")
    made = getattr(package, f"{name}{model}")(getattr(package, f"{name}Config")(**config))
    ids = torch.randint(5, 40, (1, 6))
    given = {
        "ids": {"input_ids": ids},
        "stateless": {"input_ids": ids, "use_cache": False},
        "both": {"input_ids": ids, "decoder_input_ids": ids},
        "pixels": {"pixel_values": torch.randn(1, 3, 32, 32)},
        "audio": {"input_values": torch.randn(1, 2000)},
        "speech": {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": ids},
    }[inputs]
    return made, given


TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
}
DECODER = {**TEXT, "num_key_value_heads": 2, "head_dim": 8}
GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64, "n_positions": 32}
BOTH = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64}  # fmt: skip
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
          "image_size": 32, "patch_size": 8}  # fmt: skip
VIDEO = {"size": 32, "frames": 4, "part": "models.video"}

NETWORKS: list[tuple[Any, str, int, dict[str, Any], str]] = [
    # package, name, blocks, options, how the blocks are counted
    (torchvision, "resnet18", 2 + 2 + 2 + 2, {}, "blocks of the groups"),
    (torchvision, "resnet34", 3 + 4 + 6 + 3, {}, ""),
    (torchvision, "resnet50", 3 + 4 + 6 + 3, {}, ""),
    (torchvision, "resnet101", 3 + 4 + 23 + 3, {}, ""),
    (torchvision, "resnet152", 3 + 8 + 36 + 3, {}, ""),
    (torchvision, "resnext50_32x4d", 3 + 4 + 6 + 3, {}, ""),
    (torchvision, "wide_resnet50_2", 3 + 4 + 6 + 3, {}, ""),
    (torchvision, "mobilenet_v2", 1 + 2 + 3 + 2 + 2, {}, "repeats of a group less its first"),
    (torchvision, "mobilenet_v3_large", 1 + 1 + 2 + 3 + 1 + 2, {}, "stride 1 and equal channels"),
    (torchvision, "mobilenet_v3_small", 1 + 2 + 1 + 2, {}, "stride 1 and equal channels"),
    (torchvision, "efficientnet_b0", 0 + 1 + 1 + 2 + 2 + 3 + 0, {}, "repeats less one"),
    (torchvision, "efficientnet_b1", 1 + 2 + 2 + 3 + 3 + 4 + 1, {}, "repeats less one"),
    (torchvision, "efficientnet_v2_s", 2 + 3 + 3 + 5 + 8 + 14, {}, "repeats less one, but of the first group"),
    (torchvision, "mnasnet1_0", 2 + 2 + 2 + 1 + 3 + 0, {}, "repeats less one"),
    (torchvision, "regnet_y_400mf", 1 + 3 + 6 + 6, {}, "depths"),
    (torchvision, "regnet_x_400mf", 1 + 2 + 7 + 12, {}, "depths"),
    (torchvision, "regnet_y_800mf", 1 + 3 + 8 + 2, {}, "depths"),
    (torchvision, "convnext_tiny", 3 + 3 + 9 + 3, {}, "depths"),
    (torchvision, "vit_b_32", 2 * 12, {"image_size": 64}, "attention and MLP of 12 layers"),
    (torchvision, "swin_t", 2 * (2 + 2 + 6 + 2), {}, "attention and MLP"),
    (torchvision, "swin_v2_t", 2 * (2 + 2 + 6 + 2), {}, "attention and MLP"),
    (torchvision, "maxvit_t", 5 * (2 + 2 + 5 + 2), {"size": 224}, "convolution, two attentions, two MLPs"),
    (torchvision, "r3d_18", 8, VIDEO, "blocks of the groups"),
    (torchvision, "r2plus1d_18", 8, VIDEO, ""),
    (torchvision, "mc3_18", 8, VIDEO, ""),
    (torchvision, "swin3d_t", 24, VIDEO, "attention and MLP"),
    (torchvision, "densenet121", 0, {}, "concatenations"),
    (torchvision, "vgg11_bn", 0, {}, "plain"),
    (torchvision, "squeezenet1_0", 0, {}, "concatenations"),
    (torchvision, "shufflenet_v2_x0_5", 0, {}, "concatenations"),
    (torchvision, "googlenet", 0, {"init_weights": False, "aux_logits": False}, "concatenations"),
    (timm, "resnet26d", 4 * 2, {}, "layers"),
    (timm, "resnet50d", 16, {}, "layers"),
    (timm, "resnetv2_50", 16, {}, "layers"),
    (timm, "seresnet50", 16, {}, "layers"),
    (timm, "res2net50_26w_4s", 16, {}, "layers; additions within a block are its own"),
    (timm, "res2next50", 16, {}, "layers"),
    (timm, "resnest14d", 4, {}, "layers"),
    (timm, "skresnet18", 8, {}, "layers"),
    (timm, "ecaresnet26t", 8, {}, "layers"),
    (timm, "dpn68", 3 + 4 + 12 + 3, {}, "k_sec"),
    (timm, "cspresnet50", 3 + 3 + 5 + 2, {}, "depth"),
    (timm, "cspresnext50", 3 + 3 + 5 + 2, {}, "depth"),
    (timm, "cspdarknet53", 1 + 2 + 8 + 8 + 4, {}, "depth"),
    (timm, "darknet53", 1 + 2 + 8 + 8 + 4, {}, "depth"),
    (timm, "ghostnet_100", 1 + 1 + 1 + 3 + 1 + 4, {}, "stride 1 and equal channels"),
    (timm, "efficientnet_lite0", 9, {}, "repeats less one"),
    (timm, "fbnetc_100", 1 + 2 + 3 + 3 + 3 + 3, {}, "stride 1 and equal channels"),
    (timm, "edgenext_xx_small", 2 + 2 + 6 + 2 + 3, {}, "depths, and the attention of 3 global blocks"),
    (timm, "convnextv2_atto", 2 * (2 + 2 + 6 + 2), {}, "depths; response normalisation adds to its input too"),
    (timm, "vit_tiny_patch16_224", 24, {"img_size": 64}, "attention and MLP"),
    (timm, "deit3_small_patch16_224", 24, {"img_size": 64}, "attention and MLP"),
    (timm, "cait_xxs24_224", 2 * (24 + 2) - 1, {"img_size": 64}, "attention and MLP, two of the class, which starts as a constant"),
    (timm, "beit_base_patch16_224", 24, {"img_size": 64}, "attention and MLP"),
    (timm, "xcit_nano_12_p16_224", 3 * 12 + 2 * 2, {}, "attention, convolution, MLP; two of the class alone"),
    (timm, "swin_tiny_patch4_window7_224", 24, {"size": 224}, "attention and MLP"),
    (timm, "mixer_s32_224", 2 * 8, {"size": 224}, "tokens and channels"),
    (timm, "resmlp_12_224", 2 * 12, {"size": 224}, "tokens and channels"),
    (timm, "gmlp_ti16_224", 30, {"size": 224}, "blocks"),
    (timm, "poolformer_s12", 2 * 12, {}, "pooling less x has no weights: its scale has"),
    (timm, "caformer_s18", 2 * (3 + 3 + 9 + 3), {}, "mixer and MLP"),
    (timm, "pvt_v2_b0", 2 * 8, {}, "attention and MLP"),
    (timm, "twins_pcpvt_small", 2 * (3 + 4 + 6 + 3) + 4, {"size": 224}, "attention, MLP, a position convolution a group"),
    (timm, "levit_128s", 2 * (2 + 3 + 4) + 2, {"size": 224}, "attention and MLP, an MLP between groups"),
    (timm, "focalnet_tiny_srf", 2 * (2 + 2 + 6 + 2), {}, "modulation and MLP"),
    (timm, "inception_resnet_v2", 10 + 20 + 9 + 1, {"size": 96}, "blocks"),
    (timm, "legacy_xception", 12, {"size": 96}, "blocks with a skip"),
    (timm, "inception_v4", 0, {"size": 96}, "concatenations"),
    (timm, "convmixer_768_32", 32, {}, "depthwise convolutions"),
    (timm, "nf_resnet50", 16, {}, "layers"),
    (timm, "regnetz_005", 1 + 3 + 11 + 2, {}, "stride 1 and equal channels"),
    (timm, "dla34", 2 + 4 + 4 + 2, {}, "two blocks a leaf of the trees of depth 1, 2, 2, 1"),
    (timm, "hrnet_w18_small", 1 + 2 * (2 + 3 + 4) + 4, {}, "blocks of the branches, and of the head; not the fusion of branches"),
    (timm, "rexnet_100", 11, {}, "stride 1 and no fewer channels"),
    (timm, "mobilevit_xxs", 1 + 2 + 2 * (2 + 4 + 3), {}, "inverted residuals; attention and MLP"),
    (timm, "coatnet_nano_rw_224", 3 + 4 + 2 * (6 + 3), {"size": 224}, "convolutions; attention and MLP"),
    (timm, "davit_tiny", 2 * 4 * (1 + 1 + 3 + 1), {}, "spatial and channel: attention, MLP, two position convolutions"),
    (timm, "gcvit_xxtiny", 2 * (2 + 2 + 6 + 2) + 4 + 3 + 2 + 1 + 1, {"size": 224}, "attention and MLP; 4 reductions; convolutions of the global query"),
    (timm, "volo_d1_224", 2 * (4 + 4 + 8 + 2 + 2), {"size": 224}, "attention and MLP, two of the class"),
    (timm, "crossvit_tiny_240", 3 * (2 * (1 + 4) + 2), {"size": 240}, "attention and MLP of both branches; cross attention"),
    (timm, "repvgg_a0", 1 + 3 + 13 + 0, {}, "stride 1 and equal channels"),
    (timm, "mobileone_s0", 35, {}, "layers with an identity branch"),
    (timm, "mobilenetv4_conv_small", 10, {}, "stride 1 and equal channels"),
    (timm, "efficientformer_l1", 2 * (3 + 2 + 6 + 4), {"size": 224}, "mixer and MLP"),
    (timm, "efficientvit_b0", 1 + 1 + 1 + 2 * 2 + 2 * 2, {}, "convolutions of stride 1; attention and convolution"),
    (timm, "fastvit_t8", 2 * (2 + 2 + 4 + 2) + 10 + 1 + 3, {}, "mixer and MLP; layers with an identity branch"),
    (timm, "starnet_s1", 2 + 2 + 8 + 3, {}, "depths"),
    (timm, "vovnet39a", 0, {}, "concatenations"),
    (timm, "ese_vovnet39b", 0 + 0 + 1 + 1, {}, "blocks of a group but its first"),
    (timm, "hgnet_tiny", 0 + 0 + 1 + 0, {}, "blocks of a group but its first"),
    (timm, "mambaout_femto", 3 + 3 + 9 + 3, {}, "depths"),
    (timm, "nextvit_small", 2 * (3 + 3 + 8 + 2) + 3 * (1 + 2 + 1), {}, "convolution and MLP; attention, convolution and MLP"),
    (timm, "selecsls42", 0, {}, "concatenations"),
    (transformers, "Bert", 6, TEXT, "attention and MLP of 3 layers"),
    (transformers, "Roberta", 6, TEXT, ""),
    (transformers, "Electra", 6, TEXT, ""),
    (transformers, "Albert", 6, {**TEXT, "embedding_size": 16}, "one layer, three times"),
    (transformers, "DistilBert", 6, {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64}, ""),
    (transformers, "GPT2", 6, GPT, ""),
    (transformers, "GPTJ", 3, {**GPT, "rotary_dim": 4}, "parallel attention and MLP"),
    (transformers, "GPTNeoX", 3, TEXT, "parallel attention and MLP"),
    (transformers, "Llama", 6, DECODER, ""),
    (transformers, "Mistral", 6, DECODER, ""),
    (transformers, "Qwen2", 6, DECODER, ""),
    (transformers, "Gemma2", 6, DECODER, ""),
    (transformers, "Mixtral", 6, {**DECODER, "num_local_experts": 3}, ""),
    (transformers, "Phi", 3, {**DECODER}, "parallel attention and MLP"),
    (transformers, "Falcon", 3, {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}, "parallel attention and MLP"),
    (transformers, "Bloom", 6, {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": 64}, ""),
    (transformers, "OPT", 6, {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "ffn_dim": 48, "vocab_size": 64, "word_embed_proj_dim": 32}, ""),
    (transformers, "T5", 2 * 2 + 2 * 3, {"d_model": 32, "num_layers": 2, "num_heads": 4, "d_ff": 48, "d_kv": 8, "vocab_size": 64, "inputs": "both"}, "2 an encoder layer, 3 a decoder layer"),
    (transformers, "Bart", 2 * 2 + 2 * 3, {**BOTH, "inputs": "both"}, ""),
    (transformers, "Whisper", 2 * 2 + 2 * 3, {**BOTH, "inputs": "speech", "num_mel_bins": 80, "pad_token_id": 0, "max_target_positions": 16}, ""),
    (transformers, "Mamba", 3, {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 64}, "mixers"),
    (transformers, "Mamba2", 3, {"hidden_size": 32, "num_hidden_layers": 3, "state_size": 4, "vocab_size": 64, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}, "mixers"),
    (transformers, "Rwkv", 6, {"hidden_size": 32, "num_hidden_layers": 3, "attention_hidden_size": 32, "vocab_size": 64, "context_length": 16, "inputs": "stateless"}, "attention and MLP"),
    (transformers, "ViT", 6, {**VISION, "inputs": "pixels"}, ""),
    (transformers, "Dinov2", 6, {**VISION, "inputs": "pixels"}, ""),
    (transformers, "ResNet", 4, {"embedding_size": 8, "hidden_sizes": [8, 12], "depths": [2, 2], "layer_type": "basic", "inputs": "pixels"}, "depths"),
    (transformers, "RegNet", 4, {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "groups_width": 4, "inputs": "pixels"}, "depths"),
    (transformers, "ConvNext", 4, {"hidden_sizes": [8, 16], "depths": [2, 2], "num_stages": 2, "inputs": "pixels"}, "depths"),
    (transformers, "Segformer", 2 * 4, {"hidden_sizes": [8, 16], "depths": [2, 2], "num_encoder_blocks": 2, "num_attention_heads": [1, 2], "sr_ratios": [2, 1], "mlp_ratios": [2, 2], "patch_sizes": [7, 3], "strides": [4, 2], "inputs": "pixels"}, "attention and MLP"),
    (transformers, "Wav2Vec2", 7, {**TEXT, "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "inputs": "audio"}, "attention and MLP, a position convolution"),
    (transformers, "Reformer", 0, {"hidden_size": 32, "num_attention_heads": 4, "attention_head_size": 8, "vocab_size": 64, "axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 6, "is_decoder": False}, "a reversible function of its own"),
]  # fmt: skip


def look(make: Any, name: str, options: dict[str, Any]) -> tuple[int, str, float]:
    """How many blocks are found, what else is said, and seconds."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, x = make(name, **options)
        model.eval()
        begun = time.perf_counter()
        found = trace(model, x)
    seconds = time.perf_counter() - begun
    kinds: dict[str, int] = {}
    for a in found.additions:
        kinds[a.kind] = kinds.get(a.kind, 0) + 1
    said = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    if found.refused:
        said += f"; refused: {', '.join(n for n, _ in found.refused)}"
    weighted = sum(any(p.ndim > 1 for p in m.parameters(recurse=False)) for m in model.modules())
    return len(found.additions), f"{said}; outside {len(found.outside)} of {weighted}", seconds


def main(arguments: list[str]) -> None:
    """Print the table, or write it."""
    beside_cpu_torch()
    torch.set_num_threads(1)
    out = open(arguments[arguments.index("--write") + 1], "w") if "--write" in arguments else sys.stdout
    words = [a for i, a in enumerate(arguments) if a != "--write" and arguments[i - 1 : i] != ["--write"]]
    right = total = 0
    print(f"{'package':13}{'network':31}{'blocks':>7}{'found':>7}{'seconds':>9}  kinds", file=out)
    for make, name, expected, options, _ in NETWORKS:
        if words and not any(w in name for w in words):
            continue
        total += 1
        try:
            count, said, seconds = look(make, name, options)
        except Exception as error:  # a package may be too old or too new for a network
            print(
                f"{make.__name__:13}{name:31}{expected:7}      -           {type(error).__name__}: {str(error)[:150]}",
                file=out,
                flush=True,
            )
            continue
        right += count == expected
        mark = "" if count == expected else "  ← differs"
        print(
            f"{make.__name__:13}{name:31}{expected:7}{count:7}{seconds:9.1f}  {said}{mark}",
            file=out,
            flush=True,
        )
    print(f"{right} of {total} as counted by hand; torch {torch.__version__}", file=out)


if __name__ == "__main__":
    main(sys.argv[1:])
