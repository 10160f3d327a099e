"""The size of the gradient that LEM's phase sends into the first stage, step by step of a source training: SSP with LEM after the stem, with its gradient bounded and without.

Printed, and written as CSV, a row for each precision and bound: median and largest norm of the gradient of the stem's weights over the steps, and how far (a share of its norm) the stem's first
convolution has moved at the end. Images, draws and steps are the same for all rows.

    python benchmarks/lem_gradient.py                                                                                       the miniature and its backbone
    python benchmarks/lem_gradient.py --data /data --backbone resnet18 --weights FILE --size 224 --source voc --out figures/real/lem_gradient.csv
"""
import argparse, statistics
from pathlib import Path
import pandas as pd, torch
from cdfss.basics import mix_seed
from cdfss.data.images import ImageStore, read_batch
from cdfss.data.layouts import open_dataset
from cdfss.data.manifests import fit_epoch
from cdfss.data.miniature import miniature_root
from cdfss.engine.fit import autocast
from cdfss.methods.loec import LEMOptions
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

BATCH = 8

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data'); p.add_argument('--source', default='voc'); p.add_argument('--backbone', default='miniature'); p.add_argument('--weights', default='auto')
    p.add_argument('--size', type=int, default=96); p.add_argument('--steps', type=int, default=30); p.add_argument('--lr', type=float, default=1e-4)
    p.add_argument('--bounds', default='0,10'); p.add_argument('--renorms', default='none'); p.add_argument('--precisions', default='bf16,float32'); p.add_argument('--out')
    o, rows = p.parse_args(), []
    store = ImageStore(open_dataset(o.source, o.data or miniature_root(), 'trn', on_error='skip'), o.size)
    episodes = fit_epoch(store.dataset, 0, 1, 1, o.steps*BATCH)
    store.ensure({i for q, s, _ in episodes for i in (q, *s)})
    for precision in o.precisions.split(','):
        for renorm in o.renorms.split(','):
            for bound in map(float, o.bounds.split(',')):
                segmenter = build('ssp+lem', create_backbone(BackboneOptions(backbone=o.backbone, weights=o.weights, freeze='none')), dict(lem_bound=bound, lem_renorm=renorm)).train()
                stem = [w for n, w in segmenter.backbone.named_parameters() if n.startswith('stages.stem')]
                first, optimizer = stem[0].detach().clone(), torch.optim.SGD([w for w in segmenter.parameters() if w.requires_grad], lr=o.lr, momentum=.9, weight_decay=5e-4)
                norms = []
                for step in range(o.steps):
                    torch.manual_seed(mix_seed('lem gradient', step))
                    batch = read_batch(store, episodes[step*BATCH:(step + 1)*BATCH], 'ignore', segmenter.extras_needed).episode(segmenter.backbone.mean, segmenter.backbone.std, 'cpu')
                    with autocast(precision, 'cpu'): loss = sum(segmenter.loss(batch).values())
                    optimizer.zero_grad(); loss.backward()
                    norm = sum(w.grad.square().sum() for w in stem if w.grad is not None).sqrt().item()
                    optimizer.step()
                    norms.append(norm)
                rows.append(dict(backbone=o.backbone, data=o.source, subset=o.data is not None, precision=precision, renorm=renorm, bound=bound, steps=o.steps, lr=o.lr, median=round(statistics.median(norms), 1), largest=round(max(norms), 1),
                                 moved=round(((stem[0].detach() - first).norm() / first.norm()).item(), 4)))
                print(rows[-1], flush=True)
        if o.out: Path(o.out).write_text(pd.DataFrame(rows).to_csv(index=False, lineterminator='\n'))
