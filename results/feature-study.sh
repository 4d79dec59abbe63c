#!/usr/bin/env bash
# The feature study of one model, about an hour on one CPU core (OMP_NUM_THREADS=1). From the repository root, in its environment:
#
#     for k in 0 1 2; do bash results/feature-study.sh runs/tiny64-$k $k data.source=arrays data.root=tiny64.npz data.size=64 model.stem=4; done
#     python results/feature_study.py results/feature-study-tiny64.json runs/tiny64-0 runs/tiny64-1 runs/tiny64-2 > tables.md
#
# What it needs beside it, made from sets that we may not pass on:
#     tiny64.npz       40 classes of Tiny ImageNet, 500 + 50 images each: uint8 images [20000, 64, 64, 3], int64 classes, and test_images, test_classes [2000, ...]
#     cifar64.yaml     data: {source: arrays, root: cifar64.npz, train: 10000, test: 2000}         CIFAR-10, resized to 64x64 (bicubic), in the same form
#     fashion64.yaml   data: {source: arrays, root: fashion64.npz, train: 10000, test: 2000}       Fashion-MNIST likewise
set -euo pipefail
run=$1 k=$2; shift 2; data=("$@")
ls cifar64.yaml fashion64.yaml > /dev/null
place=mid-repeat1-vit-out t=0.98 further=up-level0-upsampler-out            # the best 4x4 map of the first model's sweep, and the best place of all
few=(width=128 lr=1e-3,3e-3 l2=0.05 controls= validation=2000 "seeds=$k")
py() { local stage=$1; shift; python "$stage.py" configs/cifar10-cpu.yaml "run=$run" "seed=$k" "${data[@]}" "$@"; }
chosen() { python -c "import json; c = json.load(open('$run/probe/$1.json'))['chosen']; print('activations=' + ','.join(c['activations']), 't=' + str(c['t'][0]))"; }

py train_diffusion images=120k
py probe t=0.3,0.4,0.5,0.6,0.7,0.8,0.9,0.95,0.98 "fit=$([ "$k" = 0 ] && echo 8000 || echo 4000)" validation=2000
py probe protocol=linear activations=$place t=$t draws=1 "controls=$([ "$k" = 0 ] && echo pixels,)random"

# heads by share of the labels, on stored maps; every head sees as many images
py extract_features name=heads pool=none dtype=float16 activations=$place t=$t
for share in 1.0 0.1 0.01; do for head in linear mlp cnn attention; do
    py probe protocol=head name=head-$head-$share features=heads head=$head labels_share=$share images=60k "${few[@]}"; done; done

# how finely maps are averaged, for a linear probe that is fitted until it converges
for g in mean 2 4; do
    py extract_features name=grid-$g pool=$g dtype=float16 activations=$place t=$t
    py probe protocol=linear name=grid-$g features=grid-$g controls=; done

# fusion of two map sizes and two times; feedback
py extract_features name=fuse pool=none dtype=float16 activations=$place,$further t=0.8,$t
py probe protocol=head name=difformer features=fuse head=difformer images=40k side=4 "${few[@]}"
py probe protocol=head name=diffeed head=diffeed activations=$place t=$t draws=1 images=12k "${few[@]}"

# all kinds of activations and their properties; those that the rules keep, those that are best without rules, the outputs of levels
py probe protocol=select name=kinds activations='*' t=0.5,0.7,0.9 noisy=100 fine=0.001 local=100 fit=4000 validation=2000
py probe protocol=select name=select activations='*' t=0.5,0.7,0.9 fit=4000 validation=2000
py probe protocol=linear name=selected $(chosen select) draws=1 controls=
py probe protocol=linear name=unfiltered $(chosen kinds) draws=1 controls=
at=$(chosen select)
py probe protocol=linear name=levels activations=up-level0-upsampler-out,up-level1-upsampler-out,up-level2-repeat1-res-out "${at##* }" draws=1 controls=

# what is alike; other images
py probe protocol=cka t=0.5,0.9 against=random
for d in cifar64 fashion64; do other=("$d.yaml" "run=$run-$d" data.size=64)
    python train_diffusion.py "${other[@]}" --prepare
    python probe.py "${other[@]}" protocol=linear "checkpoint=$run/diffusion/base" activations=$place t=$t draws=1 controls=random; done
