"""How large LEM's disturbance is on a backbone, and what it costs before any training: SSP at its starting weights, with the supports disturbed as in training (a draw an episode) or not.

For each data set: class mIoU of the same episodes undisturbed, under LEM, and under LEM with each channel's mean and spread kept (renorm std); and the size of the disturbed stem features relative to what they were.

    python benchmarks/lem_size.py --out lem_size.csv                                                                       the miniature and its backbone
    python benchmarks/lem_size.py --data /data --backbone resnet18 --weights FILE --size 224 --targets voc,davis,isic,chest --out figures/real/lem_size.csv
"""
import argparse
from pathlib import Path
import pandas as pd, torch
from cdfss.data.images import ImageStore, collate
from cdfss.data.layouts import DATASETS, open_dataset
from cdfss.data.manifests import draw_nested
from cdfss.data.miniature import miniature_root
from cdfss.engine.metrics import COUNTS, class_miou, confusion
from cdfss.methods.loec import LEM, LEMOptions
from cdfss.methods.seams import build
from cdfss.models.backbones import BackboneOptions, create_backbone

def disturbed(renorm:str):
    "LEM that acts at test, and notes the relative size of what it makes."
    class Noted(LEM):
        phases, sizes = ('fit', 'test'), []
        def stage(self, name, x, role):
            new = super().stage(name, x, role)
            if new is not x: self.sizes.append((new.square().mean() / x.square().mean()).sqrt().item())
            return new
    return Noted(LEMOptions(renorm=renorm))

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data'); p.add_argument('--backbone', default='miniature'); p.add_argument('--weights', default='auto'); p.add_argument('--size', type=int, default=96)
    p.add_argument('--targets', default='voc,fss,isic,chest'); p.add_argument('--episodes', type=int, default=60); p.add_argument('--out')
    o, rows = p.parse_args(), []
    for name in o.targets.split(','):
        data = open_dataset(name, o.data or miniature_root(), 'val' if DATASETS[name].by_area else None, on_error='skip')
        store, manifest = ImageStore(data, o.size), draw_nested('balanced', data, (1,) if name == 'voc' else (1, 5), 0, o.episodes)[1]
        store.ensure({i for q, s, _ in manifest.episodes for i in (q, *s)})
        for kind in ('undisturbed', 'none', 'std'):
            backbone = create_backbone(BackboneOptions(backbone=o.backbone, weights=o.weights, freeze='none'))
            segmenter = build('ssp', backbone, {}).eval()
            if kind != 'undisturbed': segmenter.extras.append(module := disturbed(kind))
            torch.manual_seed(0)
            found = []
            with torch.inference_mode():
                for e in manifest.episodes:
                    batch = collate(store, [e], backbone.mean, backbone.std)
                    found.append(dict(zip(COUNTS, confusion(segmenter(batch).mask, batch.query_mask, batch.ignore)[0].tolist())) | dict(cls=e[2]))
            size = 1. if kind == 'undisturbed' else sum(module.sizes)/len(module.sizes)
            rows.append(dict(backbone=o.backbone, data=name, subset=o.data is not None, renorm=kind, episodes=len(manifest), class_miou=round(class_miou(pd.DataFrame(found)), 2), size=round(size, 3), manifest=manifest.hash[:8]))
            if kind != 'undisturbed': module.sizes.clear()
            print(rows[-1], flush=True)
        if o.out: Path(o.out).write_text(pd.DataFrame(rows).to_csv(index=False, lineterminator='\n'))
