"""The student: a small model that learns to say what the mixture says.

`distil.distil` is the whole of it. What an export calls, once the bundle's graphs stand and its weights are known:

    distil.make_student(
        recipe: Recipe,               # with recipe.student
        weights: Mapping[str, float], # member name -> share, fitted or given
        teacher: Teacher,             # the mixture, by its graphs or its torch models
        folder: Path,                 # kept between calls: the teacher's cache, the checkpoint and the model lie in it
        progress: Progress = NO_PROGRESS,
    ) -> Path                         # folder / "model": a Hugging Face folder with the tokenizer, fp32

The same call takes up what an interrupted one has done, and returns at once where all is done.
"""
