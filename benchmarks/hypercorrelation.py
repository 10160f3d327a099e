"""HSNet with K supports on a CPU, the plain way against ours, measured side by side in one run.

Plain: as a K-shot forward is written down: for each support, query and support are encoded, the hypercorrelation of each level is made whole, and each layer
runs on it as two convolutions; the K masks vote. Ours: `cdfss.models.hsnet`: an image is encoded once for all shots, a level is read in blocks
within the box of the support's mask, and convolutions of small support grids are matrix products. Prints seconds per episode split into encode and compare, the
ratio, the pixels that differ, and peak memory.

    python benchmarks/hypercorrelation.py                           ResNet-50, 400 px, 5 shots, random weights, episodes of the miniature's ISIC
    python benchmarks/hypercorrelation.py --method patnet           PATNet: the plain way forms its map over all channels
    python benchmarks/hypercorrelation.py --data-root DIR --checkpoint FILE
"""
import argparse, resource, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.miniature import miniature_root
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.hsnet import HSNet, hypercorrelation, resize_query, vote
from cdfss.models.importers import load_official
from cdfss.models.patnet import dual, rows

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--method', default='hsnet', choices=('hsnet', 'patnet')); p.add_argument('--backbone', default='resnet50'); p.add_argument('--checkpoint', default='')
    p.add_argument('--data-root', default=None); p.add_argument('--data', default='isic'); p.add_argument('--size', type=int, default=400)
    p.add_argument('--shots', type=int, default=5); p.add_argument('--episodes', type=int, default=6); p.add_argument('--part', default='', help=argparse.SUPPRESS)
    return p.parse_args()

def plain_pivot(conv, x):
    n, _, hq, wq, hs, ws = x.shape
    thin = x[..., ::conv.stride, ::conv.stride]
    a = conv.conv1(thin.permute(0, 4, 5, 1, 2, 3).contiguous().flatten(0, 2)).unflatten(0, (n, *thin.shape[4:])).permute(0, 3, 4, 5, 1, 2)
    b = conv.conv2(x.permute(0, 2, 3, 1, 4, 5).contiguous().flatten(0, 2)).unflatten(0, (n, hq, wq)).permute(0, 3, 1, 2, 4, 5)
    return a + b

def plain_layers(layers, x):
    for m in layers: x = plain_pivot(m, x) if hasattr(m, 'conv1') else m(x)
    return x

def plain_pair(s, match, names):
    query, support = HSNet.pair(s, match, names)
    if not hasattr(s, 'anchors'): return query, support
    maps = dual(s.prototypes(match, names)).mT @ rows(s.pairs_of(names))
    moved = lambda f: (maps.mT @ f.flatten(3)).unflatten(3, f.shape[-2:])
    return moved(query), moved(support)

def plain(s, episode):
    "One forward pass a support, as published; seconds of encoding and comparing, and the voted mask."
    encode = compare = 0.
    masks = []
    for i in range(episode.support.shape[1]):
        t0 = time.perf_counter()
        match = s.match(replace(episode, **{f: getattr(episode, f)[:, i:i + 1] for f in ('support', 'support_masks', 'support_ignore')}))
        t1 = time.perf_counter()
        net, pyramid = s.learner, [hypercorrelation(*plain_pair(s, match, names)) for names in s.levels]
        x = plain_layers(net.squeeze[0], pyramid[0])
        for squeeze, mix, c in zip(net.squeeze[1:], net.mix, pyramid[1:]):
            fine = plain_layers(squeeze, c)
            x = plain_layers(mix, resize_query(x, fine.shape[2:4]) + fine)
        x = net.decoder1(x.mean((-2, -1)))
        x = net.decoder2(torch.nn.functional.interpolate(x, scale_factor=2, mode='bilinear', align_corners=True))
        scores = s.upsample(x, episode.query.shape[-2:])
        masks.append(scores[:, 1] > scores[:, 0])
        encode, compare = encode + t1 - t0, compare + time.perf_counter() - t1
    return encode, compare, vote(torch.stack(masks, 1))

def ours(s, episode):
    t0 = time.perf_counter()
    match = s.match(episode)
    t1 = time.perf_counter()
    mask = s.decide(match, episode.query.shape[-2:]).mask
    return t1 - t0, time.perf_counter() - t1, mask

@torch.inference_mode()
def part(a):
    "Times and masks of one way, saved for the comparison."
    way, path = a.part.split(',')
    torch.manual_seed(0)
    options = BackboneOptions(backbone=a.backbone, weights='none', last_stage='last', output_stride=32, freeze='all')
    s = (load_official(a.method, a.checkpoint) if a.checkpoint else build(a.method, create_backbone(options))).eval()
    data = open_dataset(a.data, a.data_root or miniature_root())
    with tempfile.TemporaryDirectory() as cache:
        store, seconds, masks, areas = ImageStore(data, a.size, cache=Path(cache)), [], [], []
        for e in draw('balanced', data, a.shots, episodes=a.episodes).episodes:
            episode = collate(store, [e], s.backbone.mean, s.backbone.std)
            encode, compare, mask = (plain if way == 'plain' else ours)(s, episode)
            seconds.append((encode, compare)); masks.append(mask); areas.append(episode.support_masks.float().mean().item())
    torch.save(dict(seconds=seconds, masks=torch.cat(masks), area=sum(areas)/len(areas), peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6), path)

def main():
    a = arguments()
    if a.part: return part(a)                             # each way runs in a process of its own, so that peak memory is its own
    print(f"{a.method}, {a.backbone} ({Path(a.checkpoint).name if a.checkpoint else 'random weights'}), {a.size} px, {a.shots} shots, {a.episodes} episodes of "
          f"{a.data}{'' if a.data_root else ' (miniature)'}, CPU {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as d:
        done = {}
        for way in ('plain', 'ours'):
            subprocess.run([sys.executable, *sys.argv, '--part', f'{way},{d}/{way}.pt'], check=True)
            done[way] = torch.load(f'{d}/{way}.pt')
    print(f"objects cover {100 * done['plain']['area']:.0f} % of the supports\n{'way':>6} {'encode':>8} {'compare':>8} {'s/episode':>10} {'ratio':>6} {'peak GB':>8}   (median over the episodes)")
    medians = {way: torch.tensor(r['seconds']).median(0).values for way, r in done.items()}
    for way, m in medians.items():
        print(f"{way:>6} {m[0]:8.3f} {m[1]:8.3f} {m.sum():10.3f} {medians['plain'].sum() / m.sum():6.2f} {done[way]['peak']:8.2f}")
    differ = (done['plain']['masks'] != done['ours']['masks']).sum().item()
    print(f"pixels that differ: {differ} of {done['plain']['masks'].numel()}; foreground {100 * done['ours']['masks'].float().mean():.0f} %")

if __name__ == '__main__': main()
