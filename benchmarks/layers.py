"""What choosing the compared layer for each task brings: SSP with every fixed layer and with layers=auto, on the same episodes and the same encodings.

For each target and shot a row a setting: class mIoU, and the paired difference of auto from it with its 95 % bootstrap interval over episodes; beside the layers stand `best on
source` (the fixed layer that is best on as many episodes of the source set), and `best in hindsight` (the target's own best fixed layer, which nobody can know); `best alone` is auto without a temperature,
`plain mean` auto with equal weights, whatever the supports say. The last rows hold the means over the targets.

    python benchmarks/layers.py --out layers.csv                                                        the miniature and its pretrained backbone
    python benchmarks/layers.py --run runs/ssp-... --out layers.csv                                     the same after source training
    python benchmarks/layers.py --data /data --backbone resnet18 --weights FILE --size 224 --targets isic,chest,nuclei
    python benchmarks/layers.py --table figures/layers.csv                                              the rows of the README
"""
import argparse, time
from pathlib import Path
import pandas as pd, torch
from cdfss.data.images import ImageStore
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import draw
from cdfss.data.miniature import miniature_root
from cdfss.engine.evaluate import FeatureStore, evaluate, needed_stages
from cdfss.engine.metrics import class_miou, paired_bootstrap, paired_bootstrap_mean
from cdfss.engine.train import load_segmenter
from cdfss.engine.runs import Run
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data'); p.add_argument('--run'); p.add_argument('--backbone', default='miniature'); p.add_argument('--weights', default='auto'); p.add_argument('--pixels', default='auto')
    p.add_argument('--last_stage', default='stage3'); p.add_argument('--size', type=int, default=96); p.add_argument('--source', default='voc'); p.add_argument('--targets', default='fss,deepglobe,isic,chest')
    p.add_argument('--episodes', type=int, default=150); p.add_argument('--shots', default='1,5'); p.add_argument('--layers', default='auto'); p.add_argument('--out'); p.add_argument('--name'); p.add_argument('--table')
    return p.parse_args()

def table(path) -> list[str]:
    "The rows of the README's table, from what the benchmark wrote."
    d, rows = pd.read_csv(path), []
    for (name, k), g in d[d.target == 'mean'].groupby(['backbone', 'shot'], sort=False):
        g, sets = g.drop_duplicates('setting').set_index('setting'), ', '.join(d[(d.backbone == name) & (d.target != 'mean')].target.unique())
        value = [f"{g.loc[m, 'miou']:.1f}" for m in ('last', 'best on source', 'best in hindsight', 'plain mean', 'auto')]
        minus = ["{auto_minus:+.1f} [{low:.1f}, {high:.1f}]".format(**g.loc[m]) for m in ('last', 'best in hindsight', 'plain mean')]
        rows.append('| ' + ' | '.join([f"{name} ({sets}; {g.loc['auto', 'episodes']} episodes)", str(k), *value, *minus]) + ' |')
    return rows

def main(a):
    if a.table: return print('\n'.join(table(a.table)))
    torch.set_num_threads(1)
    root, started = Path(a.data) if a.data else miniature_root(), time.process_time()
    net = load_segmenter(Run(a.run)).backbone if a.run else create_backbone(BackboneOptions(backbone=a.backbone, weights=a.weights, pixels=a.pixels, last_stage=a.last_stage))
    auto = build('ssp', net.eval(), {'ssp_layers': a.layers}).eval()
    methods = {v: build('ssp', net, {'ssp_layers': v}).eval() for v in auto.views} | {'auto': auto, 'best alone': build('ssp', net, {'ssp_layers': a.layers, 'ssp_temperature': 0.}).eval(), 'plain mean': build('ssp', net, {'ssp_layers': a.layers, 'ssp_temperature': 1e6}).eval()}
    last, tables = auto.views[-1], {}
    for name in (a.source, *a.targets.split(',')):
        store = ImageStore(open_dataset(name, root, 'val' if name == 'voc' and not a.data else None, 'skip'), a.size)
        with FeatureStore(auto, store, needed_stages(methods), memory=3e9) as features:
            for k in map(int, a.shots.split(',')):
                f = evaluate(methods, store, draw('balanced', store.dataset, k, episodes=a.episodes), epoch=0, features=features)
                tables[name, k] = {m: g for m, g in f.groupby('method', sort=False)}
                print(name, k, {m: round(class_miou(g), 1) for m, g in tables[name, k].items()}, flush=True)
    rows, label = [], a.name or (f'{Path(a.run).name}' if a.run else a.backbone)
    for k in map(int, a.shots.split(',')):
        best = max(auto.views, key=lambda v: class_miou(tables[a.source, k][v]))
        of = lambda name, m: tables[name, k][best if m == 'best on source' else max(auto.views, key=lambda v: class_miou(tables[name, k][v])) if m == 'best in hindsight' else m]
        targets = a.targets.split(',')
        for m in ('auto', last, 'best on source', 'best in hindsight', 'best alone', 'plain mean', *auto.views[:-1]):
            note = dict(setting='last' if m == last else m, layer=m if m in auto.views else best if m == 'best on source' else '')
            for name in targets:
                rows.append(dict(backbone=label, shot=k, target=name, episodes=len(of(name, m)), **note, miou=class_miou(of(name, m)))
                            | dict(zip(('auto_minus', 'low', 'high'), paired_bootstrap(of(name, m), of(name, 'auto')) if m != 'auto' else (0, 0, 0))))
            pairs = [(of(name, m), of(name, 'auto')) for name in targets]
            rows.append(dict(backbone=label, shot=k, target='mean', episodes=sum(len(p) for p, _ in pairs), **note, miou=sum(class_miou(p) for p, _ in pairs)/len(pairs))
                        | dict(zip(('auto_minus', 'low', 'high'), paired_bootstrap_mean(pairs) if m != 'auto' else (0, 0, 0))))
    frame = pd.DataFrame(rows).round(2)
    print(frame[frame.target == 'mean'].to_string(index=False), f'\n{time.process_time() - started:.0f} s of processor time')
    if a.out: frame.to_csv(a.out, index=False, mode='a', header=not Path(a.out).exists())

if __name__ == '__main__': main(arguments())
