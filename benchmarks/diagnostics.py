"""CKA and sharpness against other ways of computing the same numbers, side by side in one run.

CKA: all pairs of 16 layers of two nets on 512 images, features made beforehand, against the packages torch_cka (fed by modules that replay the features) and
pytorch-cka; then the peak memory of 60 layers x 1024 images.  Sharpness: 4 stages x 8 draws of feature noise, against the plain way (the whole net for
every stage and draw, an episode at a time as published evaluators do, and batches of episodes), with the same noise, so that the losses must agree.
Beside the seconds stands the processor's time, which other work on the machine does not stretch.

    python benchmarks/diagnostics.py                                          everything, miniature's net for sharpness
    python benchmarks/diagnostics.py --backbone resnet50 --size 224 --episodes 8    a larger net, random weights
"""
import argparse, contextlib, io, json, resource, statistics, subprocess, sys, time, warnings
import numpy as np
import torch
from cdfss.basics import mix_seed
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.miniature import miniature_root
from cdfss.diagnostics.cka import Similarity, similarity
from cdfss.diagnostics.sharpness import disturbed
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone
from cdfss.models.segmenter import IGNORE, Match, cross_entropy

WIDTHS = [256]*3 + [512]*4 + [1024]*6 + [2048]*3            # the sixteen blocks of a ResNet-50, averaged over positions

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--images', type=int, default=512); p.add_argument('--repeats', type=int, default=5)
    p.add_argument('--backbone', default='miniature'); p.add_argument('--size', type=int, default=96); p.add_argument('--data', default='isic')
    p.add_argument('--episodes', type=int, default=60); p.add_argument('--draws', type=int, default=8); p.add_argument('--part', default='', help=argparse.SUPPRESS)
    return p.parse_args()

# ---- CKA --------------------------------------------------------------------------------------------------------------------
class Replay(torch.nn.Module):
    "A net whose layers give features made before, to rows named by number."
    def __init__(self, features):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Identity() for _ in features)
        self.features = features
    def forward(self, rows):
        for layer, f in zip(self.layers, self.features): layer(f[rows])

def by_torch_cka(xs, ys):
    from torch_cka import CKA
    names = [f'layers.{i}' for i in range(len(xs))]
    compare = CKA(Replay(xs), Replay(ys), 'a', 'b', model1_layers=names, model2_layers=names)
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.arange(len(xs[0]))), batch_size=len(xs[0]))
    with contextlib.redirect_stderr(io.StringIO()): compare.compare(rows)
    return compare.export()['CKA']

def by_pytorch_cka(xs, ys):
    from cka import cka_from_features
    return cka_from_features(xs, ys)

def cka_table(a):
    warnings.simplefilter('ignore')
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(a.images, 64, generator=g)
    make = lambda: [torch.relu(hidden @ torch.randn(64, w, generator=g)/8 + torch.randn(a.images, w, generator=g)) for w in WIDTHS]
    xs, ys = make(), make()
    ways = {'ours': similarity, 'pytorch-cka': by_pytorch_cka, 'torch_cka': by_torch_cka}
    truth, seconds, values = similarity([x.double() for x in xs], [y.double() for y in ys]), {w: [] for w in ways}, {}
    for n in range(a.repeats + 1):                          # interleaved; the first round warms up
        for name, f in ways.items():
            if name == 'torch_cka' and n > 2: continue
            t0, c0 = time.perf_counter(), time.process_time()
            values[name] = f(xs, ys)
            if n: seconds[name].append((time.perf_counter() - t0, time.process_time() - c0))
    print(f"CKA of all pairs of {len(xs)} layers of two nets, n={a.images}, widths {WIDTHS[0]} to {WIDTHS[-1]}, float32, {torch.get_num_threads()} threads")
    print(f"{'way':>12} {'seconds':>9} {'ratio':>7} {'processor s':>12} {'ratio':>7} {'largest difference from float64':>33}   (median of rounds)")
    middle = {name: [statistics.median(v) for v in zip(*s)] for name, s in seconds.items()}
    for name, (wall, busy) in middle.items():
        print(f"{name:>12} {wall:9.4f} {wall/middle['ours'][0]:7.2f} {busy:12.4f} {busy/middle['ours'][1]:7.2f} {(torch.as_tensor(values[name]).double() - truth).abs().max():33.2e}")

def cka_memory(layers=60, images=1024, width=2048):
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6
    g, s, t0 = torch.Generator().manual_seed(0), Similarity(), time.perf_counter()
    s.add(torch.randn(images, width, generator=g) for _ in range(layers))
    assert s.value().isfinite().all()
    return dict(layers=layers, images=images, width=width, start=start, peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1e6, seconds=time.perf_counter() - t0)

# ---- sharpness --------------------------------------------------------------------------------------------------------------
@torch.inference_mode()
def plain(segmenter, store, manifest, draws, strength, batch):
    "Mean loss per stage; for every stage and draw all images go through the whole net."
    out = {}
    for stage in segmenter.backbone.names:
        losses = []
        for d in range(draws):
            for i in range(0, len(manifest), batch):
                episodes = manifest.episodes[i:i + batch]
                b, n = collate(store, episodes, segmenter.backbone.mean, segmenter.backbone.std), len(episodes)
                keys = [store.key(q) for q, _, _ in episodes] + [store.key(p) for _, s, _ in episodes for p in s]
                def after(name, x):
                    if name != stage: return x
                    z = torch.stack([torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(mix_seed(stage, 0, k, d))) for k in keys])
                    return x + strength*x.square().mean((2, 3), keepdim=True).sqrt()*z
                made = segmenter.backbone(torch.cat([b.query, b.support.flatten(0, 1)]).contiguous(memory_format=torch.channels_last), after=after)
                match = Match({s: made[s][:n] for s in segmenter.needed}, {s: made[s][n:].unflatten(0, (n, b.shots)) for s in segmenter.needed},
                              *Match.masks(b.support_masks, b.support_ignore))
                scores = segmenter.decide(match, b.query.shape[-2:]).scores
                losses += [cross_entropy(scores[j:j + 1], b.query_mask[j:j + 1].long().masked_fill(b.ignore[j:j + 1], IGNORE)).item() for j in range(n)]
        out[stage] = float(np.mean(losses))
    return out

def sharpness_table(a):
    data = open_dataset(a.data, miniature_root())
    store, manifest = ImageStore(data, a.size), draw('balanced', data, 1, episodes=a.episodes)
    torch.manual_seed(0)
    weights = 'auto' if a.backbone == 'miniature' else 'none'
    segmenter = build('ssp', create_backbone(BackboneOptions(backbone=a.backbone, weights=weights))).eval().to(memory_format=torch.channels_last)
    store.ensure()
    def timed(f):
        t0, c0 = time.perf_counter(), time.process_time()
        return f(), time.perf_counter() - t0, time.process_time() - c0
    frame, ours, busy = timed(lambda: disturbed(segmenter, store, manifest, 'feature', strengths=(.2,), draws=a.draws))
    mine = frame[frame.stage != ''].groupby('stage').loss.mean()
    images = len({p for q, s, _ in manifest.episodes for p in (q, *s)})
    print(f"\nsharpness, {a.backbone} at {a.size} px: {len(segmenter.backbone.names)} stages x {a.draws} draws x {len(manifest)} episodes over {images} images of {a.data}")
    print(f"{'way':>32} {'seconds':>9} {'ratio':>7} {'processor s':>12} {'ratio':>7} {'largest difference of a mean loss':>35}")
    print(f"{'ours':>32} {ours:9.2f} {1:7.2f} {busy:12.2f} {1:7.2f}")
    for batch in (1, 16):
        theirs, wall, work = timed(lambda: plain(segmenter, store, manifest, a.draws, .2, batch))
        print(f"{f'plain, {batch} episode(s) at a time':>32} {wall:9.2f} {wall/ours:7.2f} {work:12.2f} {work/busy:7.2f} {max(abs(mine[k] - v) for k, v in theirs.items()):35.1e}", flush=True)

def main():
    a = arguments()
    if a.part == 'memory': return print(json.dumps(cka_memory()))
    print(f'torch {torch.__version__}')
    cka_table(a)
    r = json.loads(subprocess.run([sys.executable, __file__, '--part', 'memory'], capture_output=True, text=True, check=True).stdout)
    print(f"{r['layers']} layers x {r['images']} images of width {r['width']}: {r['seconds']:.1f} s, peak {r['peak']:.2f} GB, of which {r['start']:.2f} GB the imports")
    sharpness_table(a)

if __name__ == '__main__': main()
