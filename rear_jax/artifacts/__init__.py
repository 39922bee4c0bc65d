"""What jobs leave for one another in the workdir, and how the next one opens it; published files open the same way."""

from rear_jax.artifacts.generator import STAGES as STAGES
from rear_jax.artifacts.generator import Generator as Generator
from rear_jax.artifacts.generator import load_generator as load_generator
from rear_jax.artifacts.generator import read_generator as read_generator
from rear_jax.artifacts.tokenizer import Tokenizer as Tokenizer
from rear_jax.artifacts.tokenizer import load_tokenizer as load_tokenizer
from rear_jax.artifacts.tokenizer import outline_tokenizer as outline_tokenizer
from rear_jax.artifacts.tokenizer import read_discriminator as read_discriminator
from rear_jax.artifacts.tokenizer import read_encoder as read_encoder
from rear_jax.artifacts.tokenizer import read_tokenizer as read_tokenizer
from rear_jax.artifacts.workdir import best_generator_folder as best_generator_folder
from rear_jax.artifacts.workdir import codes_folder as codes_folder
from rear_jax.artifacts.workdir import generator_folder as generator_folder
from rear_jax.artifacts.workdir import posttrained_decoder_folder as posttrained_decoder_folder
from rear_jax.artifacts.workdir import posttrained_folder as posttrained_folder
from rear_jax.artifacts.workdir import resumable as resumable
from rear_jax.artifacts.workdir import tokenizer_folder as tokenizer_folder
