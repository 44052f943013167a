#!/usr/bin/env bash
# Every run that benchmarks/results/runs holds, most of a day on two cores; what is finished is not repeated.
#   benchmarks/everything.sh DATA_DIR [OUT]
# then `python -m benchmarks report --out OUT --keep` makes the tables.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1
where=(--data-dir "${1:?the folder with the data sets}" --out "${2:-out/runs}" --jobs 2)
bench() { python -m benchmarks "$@" "${where[@]}"; }

ours=(-m FisherAdam -m "FisherAdam schedule-free" -m DiagonalNGD)
torch=(-m AdamW -m NAdam -m SGD -m Muon)
main=("${ours[@]}" "${torch[@]}" -m "Schedule-Free AdamW")
others=(-m "DiagonalNGD auto" -m SOAP -m Sophia-H -m AdaHessian -m IVON -m SINGD)
all=("${main[@]}" "${others[@]}")
diagonal=(-m Sophia-H -m AdaHessian -m IVON)
core=(-m AdamW -m "Schedule-Free AdamW" -m "FisherAdam schedule-free")

small=(-p digits_mlp -p poisson_regression -p gaussian_regression)
mlps=(-p mnist_relu -p mnist_sigmoid -p mnist_relu_large -p mnist_sigmoid_large -p mnist_autoencoder)
images=(-p cifar_3c3d -p cifar_resnet8)
goals=(-p fit_curve -p fit_surface -p pinn_poisson)

compare() { # trials besides the defaults, seeds, then methods and problems
  bench tune --trials "$1" "${@:3}"
  bench run --track final --seeds "$2" "${@:3}"
}
compare 8 5 "${all[@]}" "${small[@]}"
compare 8 5 "${main[@]}" "${mlps[@]}"
compare 8 5 "${diagonal[@]}" "${mlps[@]}"
compare 8 5 "${core[@]}" -m FisherAdam "${torch[@]:2}" "${diagonal[@]}" -p mnist_cnn
compare 5 5 "${core[@]}" "${torch[@]:2}" "${diagonal[@]}" -p char_transformer
compare 4 5 "${core[@]}" -m NAdam -m SGD "${diagonal[@]}" "${images[@]}"

bench run --track defaults --seeds 5 "${all[@]}" "${small[@]}"
bench run --track defaults --seeds 5 "${main[@]}" "${mlps[@]}"
bench run --track defaults --seeds 3 "${main[@]}" -p mnist_cnn
bench run --track defaults --seeds 3 "${others[@]}" "${mlps[@]}" -p mnist_cnn
bench run --track defaults --seeds 1 "${all[@]}" -p char_transformer "${images[@]}"
bench run --track defaults --seeds 3 "${core[@]}" -m FisherAdam -m Muon -p char_transformer
bench run --track defaults --seeds 3 "${core[@]}" -m FisherAdam "${images[@]}"
bench run --track defaults --seeds 3 "${all[@]}" -m L-BFGS "${goals[@]}"

bench run --track sensitivity --seeds 5 "${core[@]}" -m FisherAdam "${small[@]}"
bench run --track sensitivity --seeds 1 "${core[@]}" -m FisherAdam -p mnist_relu -p mnist_sigmoid
bench run --track sensitivity --seeds 3 "${core[@]}" -m FisherAdam -p mnist_autoencoder
bench run --track sensitivity --seeds 3 "${core[@]}" -p mnist_relu_large -p mnist_sigmoid_large
bench run --track sensitivity --seeds 1 -m AdamW -m "FisherAdam schedule-free" -p mnist_cnn "${images[@]}" -p char_transformer
bench run --track goals --seeds 3

bench ablate estimator refresh damping scale averaging --seeds 2 -p digits_mlp -p poisson_regression
bench ablate scale --seeds 2 -p gaussian_regression
bench ablate scale --seeds 1 -p mnist_relu -p mnist_sigmoid -p mnist_autoencoder
bench ablate positions --seeds 1
bench ablate caution --seeds 5 -p digits_mlp -p poisson_regression
bench ablate estimator --seeds 1 -p mnist_sigmoid
bench ablate warmup --seeds 2 -p mnist_relu_large -p mnist_sigmoid_large -p mnist_autoencoder
bench ablate warmup --seeds 1 -p cifar_3c3d -p char_transformer
