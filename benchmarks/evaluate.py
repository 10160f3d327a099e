"""Evaluation, the plain way against ours, measured side by side in one run.

Plain: one episode at a time, every image decoded and encoded anew, float32, torch's default memory format, batch norms as they are. Ours: `cdfss.engine.evaluate`,
where each image is decoded once, encoded once (channels last, batch norms folded), and kept in a bounded store.  Prints seconds per episode split into decode, encode, compare and
metric, class mIoU of both on the same episodes, the ratio, and peak memory (on a GPU its own).

    python benchmarks/evaluate.py                                   ResNet-50, 400 px, 200 episodes over 100 images, random weights; on a GPU if there is one
    python benchmarks/evaluate.py --data-root DIR --weights FILE    on real images, with real weights
    python benchmarks/evaluate.py --plain-episodes 20               a quick look: the plain way on fewer episodes (its cost an episode is constant)
"""
import argparse, json, resource, subprocess, sys, tempfile, time
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from cdfss.data.images import ImageStore, collate, decode_image, decode_mask
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.miniature import miniature_root
from cdfss.engine.evaluate import FeatureStore, evaluate, needed_stages
from cdfss.engine.metrics import class_miou, confusion, to_frame
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--backbone', default='resnet50'); p.add_argument('--weights', default='none'); p.add_argument('--method', default='ssp')
    p.add_argument('--data-root', default=None); p.add_argument('--data', default='isic'); p.add_argument('--size', type=int, default=400)
    p.add_argument('--episodes', type=int, default=200); p.add_argument('--images', type=int, default=100)
    p.add_argument('--plain-episodes', type=int, default=0, help='0: all'); p.add_argument('--shots', type=int, nargs='+', default=[1, 5])
    p.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    p.add_argument('--precision', nargs='+', default=['float32', 'bf16']); p.add_argument('--part', default='', help=argparse.SUPPRESS)
    return p.parse_args()

class Undecoded(ImageStore):
    "Decodes a file every time it is asked for."
    def image(self, i): return torch.from_numpy(decode_image(self.dataset.items[i].image, self.size)[1])
    def mask(self, i):
        v = torch.from_numpy(decode_mask(self.dataset.items[i].mask, self.size, False)[1])
        return v == 1, torch.zeros_like(v, dtype=torch.bool)

def setting(a, shot):
    whole = open_dataset(a.data, a.data_root or miniature_root())
    per_class = max(1, a.images // len(whole.by_class))
    keep = {p for ps in whole.by_class.values() for p in ps[:per_class]}
    data = whole.without(set(range(len(whole))) - keep)
    torch.manual_seed(0)
    weights = a.weights if a.weights != 'none' or a.backbone != 'miniature' else 'auto'
    segmenter = build(a.method, create_backbone(BackboneOptions(backbone=a.backbone, weights=weights))).eval()
    return data, draw('balanced', data, shot, episodes=a.episodes), segmenter

def now(a):
    "The time when the device has done what it was asked."
    if a.device != 'cpu': torch.cuda.synchronize()
    return time.perf_counter()

@torch.inference_mode()
def plain(a, shot):
    data, manifest, segmenter = setting(a, shot)
    segmenter.to(a.device).backbone.quicken(fold=False)
    store, counts, s = Undecoded(data, a.size), [], dict(decode=0., encode=0., compare=0., metric=0.)
    episodes = manifest.episodes[:a.plain_episodes or None]
    for e in episodes:
        t = [now(a)]
        batch = collate(store, [e], segmenter.backbone.mean, segmenter.backbone.std)
        batch = replace(batch, query=batch.query.contiguous(), support=batch.support.contiguous()).to(a.device); t.append(now(a))
        match = segmenter.match(batch); t.append(now(a))
        mask = segmenter.decide(match, (a.size, a.size)).mask; t.append(now(a))
        counts.append(confusion(mask, batch.query_mask, batch.ignore).cpu()); t.append(now(a))
        for k, d in zip(s, np.diff(t)): s[k] += float(d)
    frame = to_frame(torch.cat(counts), torch.tensor([e[2] for e in episodes]))
    return s, len(episodes), class_miou(frame), class_miou(frame)

def ours(a, shot, precision):
    data, manifest, segmenter = setting(a, shot)
    segmenter = segmenter.to(a.device, memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as cache:
        store, s, start = ImageStore(data, a.size, cache=Path(cache)), {}, time.perf_counter()
        store.ensure(); decoded = time.perf_counter() - start
        with FeatureStore(segmenter, store, needed_stages({'m': segmenter}), device=a.device, precision=precision) as features:
            start = now(a)
            frame = evaluate({'m': segmenter}, store, manifest, epoch=0, features=features, device=a.device, precision=precision, seconds=s)
            whole = now(a) - start
    s['compare'] += max(0., whole - sum(s.values()) - features.seconds['decode'])                      # what a GPU did while nobody looked at the clock, and all else
    s = dict(decode=decoded + s.get('decode', 0) + features.seconds['decode'], encode=features.seconds['encode'], compare=s['compare'], metric=s['metric'])
    return s, len(frame), class_miou(frame), class_miou(frame[:a.plain_episodes or None])

def main():
    a = arguments()
    if a.part:                                            # each way runs in a process of its own, so that peak memory is its own
        way, shot, precision = a.part.split(',')
        s, n, miou, shared = plain(a, int(shot)) if way == 'plain' else ours(a, int(shot), precision)
        peak = torch.cuda.max_memory_allocated() / 1e9 if a.device != 'cpu' else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(json.dumps(dict(seconds=s, episodes=n, miou=miou, shared=shared, peak=peak)))
        return
    device = torch.cuda.get_device_name() if a.device != 'cpu' else f'CPU {torch.get_num_threads()} threads'
    print(f"{a.method}, {a.backbone} (weights {Path(a.weights).name}), {a.size} px, {a.episodes} episodes over about {a.images} images of "
          f"{a.data}{'' if a.data_root else ' (miniature)'}, {device}, torch {torch.__version__}")
    print(f"{'shots':>5} {'way':>16} {'decode':>8} {'encode':>8} {'compare':>8} {'metric':>8} {'s/episode':>10} {'ratio':>6} {'class mIoU':>11} {'difference':>11} {'peak GB':>8}")
    best = 0
    for shot in a.shots:
        base, ratios = None, []
        for way, precision in [('plain', 'float32'), *(('ours', p) for p in a.precision)]:
            out = subprocess.run([sys.executable, *sys.argv, '--part', f'{way},{shot},{precision}'], capture_output=True, text=True, check=True).stdout
            r = json.loads(out.strip().split('\n')[-1])
            each = {k: v / r['episodes'] for k, v in r['seconds'].items()}
            total = sum(each.values())
            base = base or (total, r['shared'])
            ratios.append(base[0] / total)
            print(f"{shot:>5} {way + ' ' + precision:>16} " + ' '.join(f'{each[k]:8.4f}' for k in ('decode', 'encode', 'compare', 'metric'))
                  + f" {total:10.4f} {base[0] / total:6.1f} {r['shared']:11.2f} {r['shared'] - base[1]:+11.3f} {r['peak']:8.2f}", flush=True)
        if shot == 5: best = max(ratios)
    where = 'SSP, ResNet-50, 400 px, 5 shots, on a GPU: at least 8x the plain way'
    if a.device != 'cpu' and (a.method, a.backbone, a.size) == ('ssp', 'resnet50', 400) and best: print(f"target ({where}): {best:.1f}x, {'met' if best >= 8 else 'NOT met'}")
    else: print(f'target NOT measured here: {where}')
    print('difference: class mIoU in points against the plain way, on the episodes that both did')

if __name__ == '__main__': main()
