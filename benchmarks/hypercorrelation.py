"""HSNet with K supports on a CPU, the plain way against ours, measured side by side in one run.

Plain: as a K-shot forward is written down: for each support, query and support are encoded, the hypercorrelation of each level is made whole, and each layer
runs on it as two convolutions; the K masks vote. Ours: what `cdfss.engine.evaluate` does: an image is encoded once for all shots and episodes and kept in a bounded
store, a level is read in blocks where the support's mask is, and convolutions of small support grids are matrix products. Prints seconds per episode split into
encode and compare, processor seconds (of all threads; other work on the machine stretches them least), the ratios, peak memory, the largest difference of the scores
and the pixels that differ. Random weights answer one class everywhere; a constant on the last bias makes `FOREGROUND` of the plain way's pixels foreground.

    python benchmarks/hypercorrelation.py                           ResNet-50, 400 px, 5 shots, random weights, episodes of the miniature's ISIC, an image drawn 2.3 times
    python benchmarks/hypercorrelation.py --images 0                no image is drawn twice
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
from cdfss.engine.evaluate import FeatureStore, needed_stages, stored_match
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.hsnet import HSNet, hypercorrelation, resize_query, vote
from cdfss.models.importers import load_official
from cdfss.models.patnet import dual, rows

FOREGROUND = .4

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--method', default='hsnet', choices=('hsnet', 'patnet')); p.add_argument('--backbone', default='resnet50'); p.add_argument('--checkpoint', default='')
    p.add_argument('--data-root', default=None); p.add_argument('--data', default='isic'); p.add_argument('--size', type=int, default=400)
    p.add_argument('--shots', type=int, default=5); p.add_argument('--episodes', type=int, default=8)
    p.add_argument('--images', type=int, default=21, help='to draw the episodes from; 0: all'); p.add_argument('--part', default='', help=argparse.SUPPRESS)
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
    "One forward pass a support, as published; seconds of encoding and comparing, and the scores of each."
    encode = compare = 0.
    shots = []
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
        shots.append(s.upsample(x, episode.query.shape[-2:]))
        encode, compare = encode + t1 - t0, compare + time.perf_counter() - t1
    return encode, compare, torch.stack(shots, 1)

def ours(s, features, episode):
    t0, before = time.perf_counter(), features.seconds['encode']
    match, _, _ = stored_match(features, features.store, [episode], 'cpu')
    answer = s.decide(match, (features.store.size,) * 2)
    encode = features.seconds['encode'] - before
    return encode, time.perf_counter() - t0 - encode, answer

@torch.inference_mode()
def part(a):
    "Times, scores and masks of one way, saved for the comparison; ours takes the constant on the last bias from what the plain way saved."
    way, path, *before = a.part.split(',')
    torch.manual_seed(0)
    options = BackboneOptions(backbone=a.backbone, weights='none', last_stage='last', output_stride=32, freeze='all')
    s = (load_official(a.method, a.checkpoint) if a.checkpoint else build(a.method, create_backbone(options))).eval()
    data = open_dataset(a.data, a.data_root or miniature_root())
    if a.images: data = data.without(set(range(len(data))) - {p for ps in data.by_class.values() for p in ps[:max(1, a.images // len(data.by_class))]})
    if before: s.learner.decoder2[-1].bias[1] -= torch.load(*before, weights_only=True)['shift']
    with tempfile.TemporaryDirectory() as cache:
        store, seconds, found, areas = ImageStore(data, a.size, cache=Path(cache)), [], [], []
        features = FeatureStore(s.to(memory_format=torch.channels_last) if way == 'ours' else s, store, needed_stages({'m': s}), spill=Path(cache))
        for e in draw('balanced', data, a.shots, episodes=a.episodes).episodes:
            episode, t0 = collate(store, [e], s.backbone.mean, s.backbone.std), time.process_time()
            encode, compare, answer = plain(s, episode) if way == 'plain' else ours(s, features, e)
            seconds.append((encode, compare, time.process_time() - t0)); found.append(answer); areas.append(episode.support_masks.float().mean().item())
    if way == 'plain':
        shots = torch.cat(found)                                                                # b k 2 h w
        shift = 0. if a.checkpoint else torch.quantile((shots[:, :, 1] - shots[:, :, 0])[..., ::4, ::4], 1 - FOREGROUND).item()
        shots[:, :, 1] -= shift
        answers = dict(scores=shots.mean(1), masks=vote(shots[:, :, 1] > shots[:, :, 0]), shift=shift)
    else: answers = dict(scores=torch.cat([p.scores for p in found]), masks=torch.cat([p.mask for p in found]))
    torch.save(dict(seconds=seconds, encoded=features.encoded, area=sum(areas)/len(areas), peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, **answers), path)

def main():
    a = arguments()
    if a.part: return part(a)                             # each way runs in a process of its own, so that peak memory is its own
    print(f"{a.method}, {a.backbone} ({Path(a.checkpoint).name if a.checkpoint else 'random weights'}), {a.size} px, {a.shots} shots, {a.episodes} episodes of "
          f"{a.data}{'' if a.data_root else ' (miniature)'}{f' over {a.images} images' if a.images else ''}, CPU {torch.get_num_threads()} threads, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as d:
        done = {}
        for way, before in (('plain', ''), ('ours', f',{d}/plain.pt')):
            subprocess.run([sys.executable, *sys.argv, '--part', f'{way},{d}/{way}.pt{before}'], check=True)
            done[way] = torch.load(f'{d}/{way}.pt', weights_only=True)
    print(f"objects cover {100 * done['plain']['area']:.0f} % of the supports; images encoded: {2*a.shots*a.episodes} against {done['ours']['encoded']}; mean over the episodes of seconds an episode:")
    print(f"{'way':>6} {'encode':>8} {'compare':>8} {'all':>8} {'ratio':>6} {'processor':>10} {'ratio':>6} {'peak GB':>8}")
    mean = {way: torch.tensor(r['seconds']) for way, r in done.items()}
    mean = {way: torch.cat([t, t[:, :2].sum(1, True)], 1).mean(0) for way, t in mean.items()}
    for way, (encode, compare, cpu, total) in mean.items():
        print(f"{way:>6} {encode:8.3f} {compare:8.3f} {total:8.3f} {mean['plain'][3] / total:6.2f} {cpu:10.3f} {mean['plain'][2] / cpu:6.2f} {done[way]['peak']:8.2f}")
    a, b = done['plain'], done['ours']
    margin, differ = a['scores'][:, 1] - a['scores'][:, 0], a['masks'] != b['masks']
    print(f"scores differ by at most {(a['scores'] - b['scores']).abs().max():.1e}; the margin of a pixel, foreground minus background, has a standard deviation of {margin.std():.1e}")
    print(f"pixels that differ: {differ.sum()} of {differ.numel()}; foreground {100 * a['masks'].float().mean():.1f} % and {100 * b['masks'].float().mean():.1f} %")

if __name__ == '__main__': main()
