"Families of backbones under the names that users write, each with timm's own constructor at a size of milliseconds."
import timm, torch
from timm import create_model                            # a test may replace timm's
from cdfss.models.backbones import BackboneOptions, backbone_of

_VIT = dict(embed_dim=32, depth=3, num_heads=2)
FAMILIES = {
    'vit_base_patch16_384': dict(_VIT, img_size=48), 'deit_base_patch16_224': dict(_VIT, img_size=48), 'deit_base_distilled_patch16_224': dict(_VIT, img_size=48), 'deit3_base_patch16_224': dict(_VIT, img_size=48),
    'vit_small_patch14_dinov2.lvd142m': dict(_VIT, img_size=56), 'vit_small_patch14_reg4_dinov2.lvd142m': dict(_VIT, img_size=56), 'vit_small_patch16_dinov3.lvd1689m': dict(_VIT, img_size=48),
    'vit_small_plus_patch16_dinov3.lvd1689m': dict(_VIT, img_size=48), 'eva02_tiny_patch14_224': dict(_VIT, img_size=56), 'convnext_tiny': dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)),
    'convnextv2_atto': dict(depths=(1, 1, 2, 1), dims=(8, 16, 32, 64)), 'swin_tiny_patch4_window7_224': dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)),
    'swinv2_tiny_window8_256': dict(embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)), 'regnety_002': {}}
PLAIN = [n for n in FAMILIES if not n.startswith(('deit3', 'deit_base_dist', 'vit_small_plus', 'convnextv2', 'swinv2', 'eva', 'regnet'))]       # the list of the README

def tiny_net(name, seed=0, **kw):
    "A net of the family with lively random weights: timm starts layer scales near zero, which would hide the blocks."
    torch.manual_seed(seed)
    extra = dict(strict_img_size=False) if name.startswith('swin') else dict(dynamic_img_size=True) if 'dinov3' in name or 'eva' in name else {}
    net = create_model(name, **{**FAMILIES[name], 'num_classes': 0, **extra, **kw})
    for n, p in net.named_parameters():
        if n.endswith(('qkv.weight', 'proj.weight', 'fc1.weight', 'fc2.weight')) and p.ndim == 2: torch.nn.init.normal_(p, 0, .2)
        if n.endswith(('gamma', 'gamma_1', 'gamma_2')): torch.nn.init.constant_(p, .5)
        elif n.endswith(('reg_token', 'cls_token', 'dist_token', 'pos_embed')): torch.nn.init.normal_(p, 0, .3)
    return net.eval()

def tiny(name, seed=0, **options):
    "The tiny net as a backbone."
    net = tiny_net(name, seed, **({'output_stride': options.get('output_stride', 8)} if name.startswith(('convnext', 'regnet')) else {}))
    return backbone_of(net, BackboneOptions(backbone=name, **dict(weights='none') | options)).eval()
