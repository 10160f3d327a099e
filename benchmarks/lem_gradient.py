"""The size of the gradient that LEM's phase sends into the first stage, step by step of a source training: SSP with LEM after the stem, with its gradient bounded and without.

Printed, and written as CSV: the norm of the gradient of the stem's weights at every step, and how far the stem's first convolution moved. The images, draws and steps are the same for all rows of a precision.

    python benchmarks/lem_gradient.py                                                                                       the miniature and its backbone
    python benchmarks/lem_gradient.py --data /data --backbone resnet18 --weights FILE --size 224 --source voc --out figures/real/lem_gradient.csv
"""
import argparse
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
    p.add_argument('--bounds', default='0,10'); p.add_argument('--renorms', default='none,std'); p.add_argument('--precisions', default='bf16,float32'); p.add_argument('--out')
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
                for step in range(o.steps):
                    torch.manual_seed(mix_seed('lem gradient', step))
                    batch = read_batch(store, episodes[step*BATCH:(step + 1)*BATCH], 'ignore', segmenter.extras_needed).episode(segmenter.backbone.mean, segmenter.backbone.std, 'cpu')
                    with autocast(precision, 'cpu'): loss = sum(segmenter.loss(batch).values())
                    optimizer.zero_grad(); loss.backward()
                    norm = sum(w.grad.square().sum() for w in stem if w.grad is not None).sqrt().item()
                    optimizer.step()
                    rows.append(dict(backbone=o.backbone, data=o.source, subset=o.data is not None, precision=precision, renorm=renorm, bound=bound, step=step + 1, loss=round(loss.item(), 3), stem_gradient=round(norm, 2),
                                     moved=round(((stem[0].detach() - first).norm() / first.norm()).item(), 4)))
                own = pd.DataFrame(rows).query('precision == @precision and renorm == @renorm and bound == @bound')
                print(f"{precision:8} renorm {renorm:4} bound {bound:3g}: stem gradient median {own.stem_gradient.median():6.1f}, largest {own.stem_gradient.max():8.1f}; the stem moved by {100*own.moved.iloc[-1]:.1f} %", flush=True)
        if o.out: Path(o.out).write_text(pd.DataFrame(rows).to_csv(index=False, lineterminator='\n'))
