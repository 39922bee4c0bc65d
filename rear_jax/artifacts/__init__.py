"""What jobs leave for one another in the workdir, and how the next one opens it; published files open the same way."""

from rear_jax.artifacts.generator import STAGES as STAGES
from rear_jax.artifacts.generator import Generator as Generator
from rear_jax.artifacts.generator import check_generator as check_generator
from rear_jax.artifacts.generator import check_stage as check_stage
from rear_jax.artifacts.generator import load_generator as load_generator
from rear_jax.artifacts.generator import read_generator as read_generator
from rear_jax.artifacts.tokenizer import Tokenizer as Tokenizer
from rear_jax.artifacts.tokenizer import check_discriminator as check_discriminator
from rear_jax.artifacts.tokenizer import check_encoder_at as check_encoder_at
from rear_jax.artifacts.tokenizer import check_tokenizer as check_tokenizer
from rear_jax.artifacts.tokenizer import check_tokenizer_at as check_tokenizer_at
from rear_jax.artifacts.tokenizer import load_tokenizer as load_tokenizer
from rear_jax.artifacts.tokenizer import outline_tokenizer as outline_tokenizer
from rear_jax.artifacts.tokenizer import read_discriminator as read_discriminator
from rear_jax.artifacts.tokenizer import read_encoder as read_encoder
from rear_jax.artifacts.tokenizer import read_tokenizer as read_tokenizer
from rear_jax.artifacts.workdir import best_generator_folder as best_generator_folder
from rear_jax.artifacts.workdir import check_resumable as check_resumable
from rear_jax.artifacts.workdir import codes_folder as codes_folder
from rear_jax.artifacts.workdir import converted_folder as converted_folder
from rear_jax.artifacts.workdir import generator_folder as generator_folder
from rear_jax.artifacts.workdir import posttrained_decoder_folder as posttrained_decoder_folder
from rear_jax.artifacts.workdir import posttrained_folder as posttrained_folder
from rear_jax.artifacts.workdir import resumable as resumable
from rear_jax.artifacts.workdir import to_be_made as to_be_made
from rear_jax.artifacts.workdir import tokenizer_folder as tokenizer_folder
