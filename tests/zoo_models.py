"""The models of the zoo: all of torchvision that holds batch norms, and one of every timm family.

Nothing is downloaded: weights are random. The inputs are as small as each model allows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CROSS_SECTION", "MODELS", "TORCHVISION", "Model", "has_no_norms"]


@dataclass(frozen=True)
class Model:
    """A model of the zoo and its inputs.

    `watch` are modules whose outputs are compared as well; `says_float` marks a model that says
    `.float()` where it means its own dtype.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Any]
    watch: tuple[str, ...] = ()
    says_float: bool = False

    def example(self, seed: int) -> Any:
        """Inputs in float32; other seeds, other values."""
        return self.inputs(torch.Generator().manual_seed(seed))


def _names(text: str) -> list[str]:
    return text.split()


def _image(size: int, random: torch.Generator) -> Tensor:
    return torch.randn(2, 3, size, size, generator=random)


def _photos(size: int, random: torch.Generator) -> tuple[list[Tensor]]:
    return ([torch.rand(3, size, size + 16 * i, generator=random) for i in range(2)],)


def _clip(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=random)


def _pair(size: int, random: torch.Generator) -> dict[str, Any]:
    images = (torch.rand(2, 1, 3, size, size, generator=random) * 2 - 1).unbind()
    return {"image1": images[0], "image2": images[1], "num_flow_updates": 2}


def _torchvision(name: str, **options: Any) -> nn.Module:
    from torchvision import models

    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False  # minutes of truncated normals
    return models.get_model(name, weights=None, **options)


def _timm(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=False)


def _frozen_detector(name: str, **options: Any) -> nn.Module:
    """The same detector on a backbone of FrozenBatchNorm2d, as the pretrained ones have it."""
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

    kind, _, base = name.partition("_")
    if kind in ("retinanet", "fcos"):
        sizes = [(size,) if kind == "fcos" else (size, 2 * size) for size in (8, 16, 32, 64, 128)]
        options["anchor_generator"] = detection.anchor_utils.AnchorGenerator(
            tuple(sizes), ((1.0,),) * 5
        )
    if base.startswith("mobilenet"):
        backbone = mobilenet_backbone(
            backbone_name="mobilenet_v3_large", weights=None, fpn=True, trainable_layers=6
        )
        options["rpn_anchor_generator"] = detection.anchor_utils.AnchorGenerator(
            ((32, 64),) * 3, ((0.5, 1.0),) * 3
        )
    else:
        backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=5)
    return _FROZEN[kind](backbone, num_classes=91, **options)


def _detector(kind: str) -> Callable[..., nn.Module]:
    def build(*args: Any, **options: Any) -> nn.Module:
        from torchvision.models import detection

        return getattr(detection, kind)(*args, **options)

    return build


_FROZEN = {
    "fasterrcnn": _detector("FasterRCNN"),
    "maskrcnn": _detector("MaskRCNN"),
    "keypointrcnn": _detector("KeypointRCNN"),
    "retinanet": _detector("RetinaNet"),
    "fcos": _detector("FCOS"),
}

# Untrained detectors score everything low: without a threshold they return boxes to compare.
_TWO_STAGE = {
    "min_size": 96, "max_size": 160, "box_score_thresh": 0.0, "box_detections_per_img": 8,
    "rpn_post_nms_top_n_test": 24,
}  # fmt: skip
_ONE_STAGE = {"score_thresh": 0.0, "detections_per_img": 8, "topk_candidates": 24}
_BUILT_WITH: dict[str, dict[str, Any]] = {
    "fasterrcnn": _TWO_STAGE, "maskrcnn": _TWO_STAGE, "keypointrcnn": _TWO_STAGE,
    "retinanet": {"min_size": 96, "max_size": 160, **_ONE_STAGE},
    "fcos": {"min_size": 96, "max_size": 160, **_ONE_STAGE},
    "ssdlite320": _ONE_STAGE,
}  # fmt: skip
_SEGMENTING = {"deeplabv3", "fcn", "lraspp"}

TORCHVISION = _names("""
deeplabv3_mobilenet_v3_large deeplabv3_resnet50 deeplabv3_resnet101
densenet121 densenet161 densenet169 densenet201
efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
efficientnet_b6 efficientnet_b7 efficientnet_v2_s efficientnet_v2_m efficientnet_v2_l
fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn fasterrcnn_resnet50_fpn
fasterrcnn_resnet50_fpn_v2 fcn_resnet50 fcn_resnet101 fcos_resnet50_fpn googlenet inception_v3
keypointrcnn_resnet50_fpn lraspp_mobilenet_v3_large maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2
maxvit_t mc3_18 mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3 mobilenet_v2 mobilenet_v3_large
mobilenet_v3_small r2plus1d_18 r3d_18 raft_large
regnet_x_400mf regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf regnet_x_8gf regnet_x_16gf regnet_x_32gf
regnet_y_400mf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf regnet_y_16gf regnet_y_32gf
regnet_y_128gf resnet18 resnet34 resnet50 resnet101 resnet152 resnext50_32x4d resnext101_32x8d
resnext101_64x4d retinanet_resnet50_fpn retinanet_resnet50_fpn_v2 s3d
shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
ssdlite320_mobilenet_v3_large vgg11_bn vgg13_bn vgg16_bn vgg19_bn wide_resnet50_2 wide_resnet101_2
""")

_WITHOUT_NORMS = (
    "alexnet", "convnext", "mvit", "raft_small", "squeezenet", "ssd300", "swin", "vgg", "vit_",
)  # fmt: skip

_FROZEN_DETECTORS = _names("""
fasterrcnn_resnet50_fpn fasterrcnn_mobilenet_v3_large_fpn maskrcnn_resnet50_fpn
keypointrcnn_resnet50_fpn retinanet_resnet50_fpn fcos_resnet50_fpn
""")

# One model of every timm family with batch norms.
_TIMM = _names("""
halonet_h1 test_byobnet convmixer_768_32 cpubone_nano cs3darknet_focus_s cspnext_tiny densenet121
dla46x_c dpn48b efficientformer_l1 efficientformerv2_s0 mobilenetv2_035 efficientvim_m1
efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 ghostnet_050 hardcorenas_b hgnetv2_b0
hrnet_w18_small iformer_t inception_next_atto inception_resnet_v2 inception_v3 inception_v4
lcnetv2_small levit_128s lowformer_b0 maxvit_pico_rw_256 mobilenetv3_small_050 mobilevit_xxs
nextvit_small regnetx_002 repghostnet_050 repvit_m0_9 res2next50 resnest14d resnet10t resnetv2_18
rexnet_100 selecsls42 legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
tiny_vit_5m_224 tresnet_m visformer_tiny vit_small_resnet50d_s16_224 volo_d1_224
ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224 botnet26t_256
eca_botnext26ts_256 mobileone_s1 repvgg_a0 darknet17 cspresnet50 skresnext50_32x4d mixnet_s
ghostnetv3_050 tf_efficientnetv2_b0 efficientnet_lite0 mnasnet_small tinynet_e hgnet_tiny
coatnet_pico_rw_224 fbnetv3_b lcnet_035 mobilevitv2_050 regnetv_040 regnety_002 regnetz_b16 gernet_s
resnetaa34d resnetblur18 seresnet18 ecaresnet26t vovnet39a densenetblur121d cspdarknet53 fbnetc_100
spnasnet_100 semnasnet_050 mobilenet_edgetpu_100 rexnetr_100 regnetz_005 ecaresnetlight vgg11_bn
gcresnet33ts seresnext26ts resnext50_32x4d resnetrs50 legacy_seresnext26_32x4d nasnetalarge
pnasnet5large halo2botnet50ts_256 haloregnetz_b lambda_resnet26t lamhalobotnet50ts_256
sebotnet33ts_256 sehalonet33ts bat_resnext26ts eca_resnext26ts gcresnext26ts resnet32ts resnext26ts
seresnet33ts cspresnext50 darknetaa53 sedarknet21 gc_efficientnetv2_rw_t ecaresnext26t_32x4d
seresnetaa50d seresnext26d_32x4d eca_vovnet39b
""")

# Where 64 pixels are too few, or the size is fixed.
_TIMM_SIZES = {
    "halonet_h1": 256,
    "efficientformer_l1": 224,
    "efficientformerv2_s0": 224,
    "inception_resnet_v2": 96,
    "inception_v3": 96,
    "inception_v4": 96,
    "levit_128s": 224,
    "maxvit_pico_rw_256": 256,
    "visformer_tiny": 224,
    "vit_small_resnet50d_s16_224": 224,
    "volo_d1_224": 224,
    "botnet26t_256": 256,
    "eca_botnext26ts_256": 256,
    "coatnet_pico_rw_224": 224,
    "halo2botnet50ts_256": 256,
    "haloregnetz_b": 224,
    "lamhalobotnet50ts_256": 256,
    "sebotnet33ts_256": 256,
    "sehalonet33ts": 256,
    "bat_resnext26ts": 256,
}


def has_no_norms(name: str) -> bool:
    """Whether a model of torchvision belongs to a family without batch norms."""
    return name.startswith(_WITHOUT_NORMS) and not name.endswith("_bn")


def _input(name: str) -> Callable[[torch.Generator], Any]:
    special = {
        "inception_v3": partial(_image, 96),
        "maxvit_t": partial(_image, 224),
        "raft_large": partial(_pair, 128),
        "s3d": partial(_clip, (1, 3, 16, 224, 224)),
    }
    if name in special:
        return special[name]
    if name in ("mc3_18", "r3d_18", "r2plus1d_18"):
        return partial(_clip, (2, 3, 4, 32, 32))
    return partial(
        _photos if _family(name) in _BUILT_WITH else _image, 96 if _detects(name) else 64
    )


def _family(name: str) -> str:
    return name.partition("_")[0]


def _detects(name: str) -> bool:
    return _family(name) in _BUILT_WITH


def _models() -> Sequence[Model]:
    found = []
    for name in TORCHVISION:
        options = dict(_BUILT_WITH.get(_family(name), {}))
        if _detects(name) or _family(name) in _SEGMENTING:
            options["weights_backbone"] = None
        if _family(name) in ("deeplabv3", "fcn"):
            options["aux_loss"] = True
        build = partial(_torchvision, name, **options)
        watch = ("backbone",) if _detects(name) else ()
        odd = _family(name) == "raft"
        found.append(Model(f"torchvision:{name}", build, _input(name), watch, says_float=odd))
    for name in _FROZEN_DETECTORS:
        build = partial(_frozen_detector, name, **_BUILT_WITH[_family(name)])
        found.append(Model(f"torchvision:{name}+frozen", build, _input(name), ("backbone",)))
    for name in _TIMM:
        size = _TIMM_SIZES.get(name, 64)
        found.append(Model(f"timm:{name}", partial(_timm, name), partial(_image, size)))
    return found


MODELS: dict[str, Model] = {model.name: model for model in _models()}

# Small and unlike each other: what runs with every test run.
CROSS_SECTION = tuple(
    f"torchvision:{name}"
    for name in _names("""
    densenet121 efficientnet_b0 fasterrcnn_mobilenet_v3_large_320_fpn googlenet
    lraspp_mobilenet_v3_large mnasnet0_5 mobilenet_v3_small r3d_18 raft_large regnet_y_400mf
    resnet18 shufflenet_v2_x0_5 ssdlite320_mobilenet_v3_large
    fasterrcnn_mobilenet_v3_large_fpn+frozen
    """)
) + tuple(
    f"timm:{name}"
    for name in _names("""
    cpubone_nano dla46x_c efficientvit_m0 efficientvit_b0 fastvit_t8 ghostnet_050 hrnet_w18_small
    levit_128s mobileone_s1 repvgg_a0 skresnet18 test_byobnet xcit_nano_12_p8_224
    """)
)
