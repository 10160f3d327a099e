"Writes the lists of the `subset` data sets (cdfss/assets/subset_*.json): python benchmarks/subsets.py DATA"
import dataclasses, json, sys
from cdfss.basics import atomic_write
from cdfss.data.subsets import make_subset, subset_file

WHAT = dict(voc='PASCAL VOC 2012 photographs from an animal-pose selection, longest side 400 px', isic='ISIC 2018 skin lesions, 200 of each diagnosis, 512 x 512 px',
            chest='60 Montgomery and 60 Shenzhen radiographs, 512 x 512 px', davis='DAVIS, 20 video objects with 10 frames each, 480 x 270 px',
            nuclei='Data Science Bowl 2018, nuclei merged', cracks='CrackForest, cracks in roads')
EPISODES = 200

if __name__ == '__main__':
    for name, what in WHAT.items():
        made = make_subset(name, sys.argv[1], what, *(() if name == 'voc' else ('balanced', EPISODES)))
        lines = [json.dumps(k) + ': ' + json.dumps(v, separators=(',', ':')) for k, v in dataclasses.asdict(made).items()]
        atomic_write(subset_file(name), '{' + ',\n '.join(lines) + '}\n')
        print(name, made.counts, made.manifests)
