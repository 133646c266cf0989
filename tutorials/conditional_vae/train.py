"""Train the autoencoders that ship with this tutorial, and write their weights.

    python tutorials/conditional_vae/train.py                 # all four, two minutes
    python tutorials/conditional_vae/train.py bernoulli_2     # only these

The data are scikit-learn's digits; nothing is downloaded. The last line for each model compares
the ELBO of images that took no part in the training.
"""

import argparse
import time

import autoencoder
import pyro
import torch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models", nargs="*", default=[], help=", ".join(autoencoder.MODELS))
    parser.add_argument("--steps", type=int, default=autoencoder.Training().num_steps)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.models or autoencoder.MODELS:
        pyro.set_rng_seed(args.seed)
        likelihood, latent_size = autoencoder.MODELS[name]
        images = autoencoder.images_for(likelihood)
        vae = autoencoder.VAE(likelihood, latent_size)
        started = time.process_time()
        training = autoencoder.Training(num_steps=args.steps)
        validation = autoencoder.train(vae, images.train, images.validation, training)
        test = float(autoencoder.elbo(vae, images.test, 100).mean())
        path = autoencoder.weights_path(name)
        path.parent.mkdir(exist_ok=True)
        torch.save(vae.state_dict(), path)
        print(
            f"{name}: ELBO {validation:.2f} on validation images, {test:.2f} on test images, "
            f"{time.process_time() - started:.0f} s of processor time, "
            f"{path.stat().st_size / 1000:.0f} kB",
            flush=True,
        )


if __name__ == "__main__":
    main()
