"""Training, the plain way against ours, measured side by side in one run.

Plain: float32, contiguous images, batch norms as they are, torch's default optimizer, every file decoded and every image encoded where it is used, nothing read ahead, the loss fetched after
each step.  Ours: `cdfss.engine.fit` on decoded images, read ahead, channels last, batch norms folded, fused optimizer, frozen stages from a store where they fit, in float32 and bf16.  Both take the
same episodes, rates and random numbers.  Prints episodes a second, peak memory, the ratio, how far the loss curves are apart beside what two seeds of the plain way are, and the share of the
roofline: convolution FLOPs of a step over the rate of a large matrix product in the same numbers.  The curves are drawn over each other in --picture, their numbers beside it.

    python benchmarks/train.py                                             SSP, ResNet-50, 400 px, batch 8; on a GPU if there is one
    python benchmarks/train.py --backbone miniature --size 96 --device cpu  a quick look
    python benchmarks/train.py --ways plain ours:bf16 ours:bf16:compile     which ways; the first is the one the others are compared with
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from cdfss.basics import mix_seed
from cdfss.data.images import ImageStore, collate, decode_image, decode_mask
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import fit_epoch
from cdfss.data.miniature import miniature_root
from cdfss.engine.evaluate import lasting_features
from cdfss.engine.fit import FitOptions, autocast, fit, rate
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

TARGET = dict(method='ssp', backbone='resnet50', size=400, batch=8)
NEEDED = 3.

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--method', default='ssp'); p.add_argument('--backbone', default='resnet50'); p.add_argument('--weights', default='none'); p.add_argument('--freeze', default='auto')
    p.add_argument('--data-root', default=None); p.add_argument('--size', type=int, default=400); p.add_argument('--batch', type=int, default=8); p.add_argument('--shots', type=int, default=1)
    p.add_argument('--points', type=int, default=6, help='of the loss curve; the first is not timed'); p.add_argument('--episodes', type=int, default=32, help='a point'); p.add_argument('--lr', type=float, default=1e-3)
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu'); p.add_argument('--ways', nargs='+', default=['plain', 'ours:float32', 'ours:bf16'])
    p.add_argument('--picture', default='runs/benchmark-train.png'); p.add_argument('--part', default='', help=argparse.SUPPRESS)
    return p.parse_args()

class Undecoded(ImageStore):
    "Decodes a file every time it is asked for."
    def image(self, i): return torch.from_numpy(decode_image(self.dataset.items[i].image, self.size)[1])
    def mask(self, i): return self._split(i, decode_mask(self.dataset.items[i].mask, self.size, self.dataset.index_masks)[1])

def setting(a):
    torch.manual_seed(0)
    weights = a.weights if a.weights != 'none' or a.backbone != 'miniature' else 'auto'
    segmenter = build(a.method, create_backbone(BackboneOptions(backbone=a.backbone, weights=weights, freeze=a.freeze)))
    return open_dataset('voc', a.data_root or miniature_root(), 'trn'), segmenter

def settle(device):
    if device != 'cpu': torch.cuda.synchronize()

def separately(segmenter, batch):
    "The stages of the queries, then of all supports, each encoded by itself."
    shown = [segmenter.encode(x.contiguous(), queries=n) for x, n in ((batch.query, None), (batch.support.flatten(0, 1), 0))]
    return {n: torch.cat([s[n] for s in shown]) for n in shown[0]}

def plain(a, seed):
    data, segmenter = setting(a)
    segmenter.backbone.quicken(fold=False)
    segmenter, store, total = segmenter.to(a.device), Undecoded(data, a.size), a.points * -(-a.episodes // a.batch)
    optimizer, losses, seconds, step = torch.optim.SGD([p for p in segmenter.parameters() if p.requires_grad], lr=a.lr, momentum=.9, weight_decay=5e-4), [], [], 0
    for point in range(1, a.points + 1):
        episodes, found = fit_epoch(data, seed, point, a.shots, a.episodes), 0.
        settle(a.device); start = time.perf_counter()
        for i in range(0, len(episodes), a.batch):
            torch.manual_seed(mix_seed('fit step', seed, point, i // a.batch))
            for group in optimizer.param_groups: group['lr'] = a.lr * rate('step', step, total)
            segmenter.train()
            batch = collate(store, episodes[i:i + a.batch], segmenter.backbone.mean, segmenter.backbone.std).to(a.device)
            loss = sum(segmenter.loss(batch, separately(segmenter, batch)).values())
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            found, step = found + loss.item() * len(batch), step + 1
        settle(a.device); seconds.append(time.perf_counter() - start)
        losses.append(found / len(episodes))
    return losses, seconds

def ours(a, seed, precision, compiled):
    data, segmenter = setting(a)
    segmenter.backbone.quicken(compile=compiled)
    segmenter, store = segmenter.to(a.device, memory_format=torch.channels_last), ImageStore(data, a.size)
    start = time.perf_counter(); store.ensure(); decoding = time.perf_counter() - start        # once for all epochs of all runs
    o = FitOptions(epochs=a.points, fit_episodes=a.episodes, batch=a.batch, fit_shot=a.shots, lr=a.lr, precision=precision)
    features = lasting_features(segmenter.train(), store, segmenter.needed, prefix=True, device=a.device, precision=precision)
    losses, seconds, start = [], [], None
    settle(a.device); start = time.perf_counter()
    for row in fit(segmenter, store, o, seed=seed, device=a.device, features=features):
        settle(a.device); seconds.append(time.perf_counter() - start); losses.append(row['loss'])
        start = time.perf_counter()
    return losses, seconds, decoding

def flops(a):
    "Convolution FLOPs, forward and backward, of an episode."
    data, segmenter = setting(a)
    segmenter, store = segmenter.to(a.device, memory_format=torch.channels_last).train(), Undecoded(data, a.size)
    batch = collate(store, fit_epoch(data, 0, 1, a.shots, 2), segmenter.backbone.mean, segmenter.backbone.std).to(a.device)
    with FlopCounterMode(display=False) as counter: sum(segmenter.loss(batch).values()).backward()
    return sum(n for op, n in counter.get_flop_counts()['Global'].items() if 'convolution' in str(op)) / len(batch)

def matmul_rate(precision, device):
    "FLOPs a second of a large matrix product; float32 on a GPU in the numbers its convolutions use (TF32 where cudnn may)."
    n, dtype = 8192 if device != 'cpu' else 1024, torch.bfloat16 if precision == 'bf16' else torch.float32
    if device != 'cpu': torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    x, y = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = np.inf
    for _ in range(10):
        settle(device); start = time.perf_counter(); x @ y; settle(device)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best

def measure(a):
    "One way in this process, so that peak memory is its own."
    way, seed = a.part.rsplit(',', 1)
    kind, *how = way.split(':')
    precision = how[0] if how else 'float32'
    if kind == 'count': return dict(flops=flops(a), rates={p: matmul_rate(p, a.device) for p in how})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    losses, seconds, *decoding = plain(a, int(seed)) if kind == 'plain' else ours(a, int(seed), precision, 'compile' in how)
    peak = torch.cuda.max_memory_allocated() / 1e9 if a.device != 'cpu' else (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    return dict(losses=losses, seconds=seconds, decoding=sum(decoding), peak=peak)

def main():
    a = arguments()
    if a.part: return print(json.dumps(measure(a)))
    name = torch.cuda.get_device_name() if a.device != 'cpu' else f'CPU, {torch.get_num_threads()} threads'
    print(f"{a.method}, {a.backbone}, {a.size} px, batch {a.batch}, {a.shots}-shot, {a.points} x {a.episodes} episodes of voc{'' if a.data_root else ' (miniature)'}, {name}, torch {torch.__version__}", flush=True)
    def part(way, seed):
        done = subprocess.run([sys.executable, *sys.argv, '--part', f'{way},{seed}'], capture_output=True, text=True)
        if done.returncode: raise SystemExit(f'{way}: {done.stderr.strip()[-2000:]}')
        return json.loads(done.stdout.strip().split('\n')[-1])
    precisions = sorted({(w.split(':') + ['float32'])[1] for w in a.ways})
    count, curves, first = part(':'.join(['count', *precisions]), 0), {}, None
    print(f"{count['flops'] / 1e9:.1f} GFLOP of convolutions an episode; matrix product: " + ', '.join(f"{r / 1e12:.2f} TFLOP/s in {p}" for p, r in count['rates'].items()))
    print(f"{'way':>20} {'episodes/s':>11} {'ratio':>6} {'peak GB':>8} {'of roofline':>12} {'last loss':>10} {'rms from the first':>19}", flush=True)
    rms = lambda x, y: float(np.sqrt(np.mean((np.array(x) - y)**2)))
    ratios = {}
    for way, seed in ((a.ways[0], 0), (a.ways[0], 1), *((w, 0) for w in a.ways[1:])):
        r = part(way, seed)
        speed = a.episodes * (a.points - 1) / sum(r['seconds'][1:])
        first, label = first or (speed, r['losses']), f'{way}, seed {seed}'
        curves[label], ratios[label] = r['losses'], speed / first[0]
        precision = (way.split(':') + ['float32'])[1]
        print(f"{label:>20} {speed:11.2f} {speed / first[0]:6.2f} {r['peak']:8.2f} {count['flops'] * speed / count['rates'][precision]:12.1%} {r['losses'][-1]:10.4f} {rms(r['losses'], first[1]):19.4f}"
              + (f"   (decoding all images once: {r['decoding']:.1f} s)" if r['decoding'] > 1 else ''), flush=True)
    noise = rms(curves[f'{a.ways[0]}, seed 1'], first[1])
    for label, losses in curves.items():
        if not label.startswith(a.ways[0]): print(f"{label}: {rms(losses, first[1]) / noise:.2f} of the noise between two seeds: {'agrees' if rms(losses, first[1]) <= noise else 'DIFFERS'}")
    best = max(v for k, v in ratios.items() if k.startswith('ours')) if any(k.startswith('ours') for k in ratios) else 0
    if a.device != 'cpu' and all(getattr(a, k) == v for k, v in TARGET.items()) and a.ways[0] == 'plain':
        print(f"target (SSP, ResNet-50, 400 px, batch 8, on a GPU: at least {NEEDED:.0f}x the plain way): {best:.2f}x, {'met' if best >= NEEDED else 'NOT met'}")
    else: print(f"target NOT measured here: SSP, ResNet-50, 400 px, batch 8, on a GPU: at least {NEEDED:.0f}x the plain way")
    draw(a, curves)

def draw(a, curves):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    path = Path(a.picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    seen = a.episodes * np.arange(1, a.points + 1)
    pd.DataFrame({'episodes': seen, **curves}).to_csv(path.with_suffix('.csv'), index=False)
    fig, ax = plt.subplots(figsize=(6, 4))
    for (label, losses), style in zip(curves.items(), ('k-', 'k:', 'C0--', 'C1-.', 'C2--', 'C3-.')): ax.plot(seen, losses, style, label=label)
    ax.set(xlabel='training episodes', ylabel='loss', title=f'{a.method}, {a.backbone}, {a.size} px, batch {a.batch}')
    ax.legend(frameon=False)
    fig.savefig(path, dpi=120, bbox_inches='tight')
    print(f"{path}, {path.with_suffix('.csv')}: the loss curves")

if __name__ == '__main__': main()
