"Made-up episodes, small backbones and the list of recipes."
import torch
from cdfss.basics import mix_seed
from cdfss.episode import Episode
from cdfss.methods.seams import ALIASES, MODULES, build, discover, parse_recipe
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.segmenter import BASES

discover()
PAIRS = [(b, m) for b in sorted(BASES) for m in sorted(MODULES) if 'attend' not in MODULES[m].seams or BASES[b].attends]
# bases with attention blocks, which take longer, meet the modules of other seams in the tests of PAIRS only
RECIPES = sorted({*BASES, *(f'{b}+{m}' for b, m in PAIRS if not BASES[b].attends or 'attend' in MODULES[m].seams), *ALIASES, 'ssp+lem+lcm'})
SMALL = dict(sccan_blocks=3, hdmnet_dim=16)      # a plain block, a shifted one, and the last

def episode(b=2, k=1, size=65, seed=0, void=True) -> Episode:
    """Coloured noise with a rectangle of another colour as object; the query and supports of an episode share both colours. Superpixels are
    the cells of random points."""
    g = torch.Generator().manual_seed(mix_seed('episode', seed))
    n = k + 1
    masks = torch.zeros(b, n, size, size, dtype=torch.bool)
    for i in range(b):
        for j in range(n):
            y, x = torch.randint(0, size//2, (2,), generator=g).tolist()
            masks[i, j, y:y + size//2, x:x + size//3] = True
    colours = torch.randn(b, 2, 1, 3, 1, 1, generator=g)
    images = torch.where(masks[:, :, None], colours[:, 1], colours[:, 0]) + .3*torch.randn(b, n, 3, size, size, generator=g)
    ignore = torch.zeros_like(masks)
    if void: ignore[..., :size//8, :] = True
    place = torch.stack(torch.meshgrid(torch.arange(24.), torch.arange(24.), indexing='ij'), -1).view(-1, 2)
    maps = {f'slic-{p}': torch.cdist(place, 24*torch.rand(b*n, p*p, 2, generator=g)).argmin(-1).view(b, n, 24, 24) for p in (5, 10, 15, 20)}
    return Episode(images[:, 0], images[:, 1:], masks[:, 1:], query_mask=masks[:, 0], ignore=ignore[:, 0], support_ignore=ignore[:, 1:], extras=maps)

def enliven(net):
    "Random batch norms: at timm's start the last one of each block is 0, which hides the block, and all statistics are 0 and 1."
    for m in net.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, .1)
            m.running_var.uniform_(.5, 1.5)
            torch.nn.init.normal_(m.weight, 1, .1)
    return net

def backbone(seed=0, **options):
    "The miniature's net with random weights."
    torch.manual_seed(seed)
    return enliven(create_backbone(BackboneOptions(**dict(weights='none') | options)))

def segmenter(recipe, values=None, seed=0, **options):
    "A recipe on a random backbone as its base wants it, in eval mode."
    fields = BackboneOptions.__dataclass_fields__
    own = {k: v for k, v in BASES[parse_recipe(recipe).base].defaults('miniature').items() if k in fields}
    return build(recipe, backbone(seed, **own | options), SMALL | (values or {})).eval()
