"""The peer of W6 that people write themselves: sentence-transformers behind a minimal FastAPI route.

OMP_NUM_THREADS=1 python benchmarks/peers/embeddings_server.py MODEL_FOLDER 7998
python benchmarks/serve.py --index INDEX --peer fastapi=http://127.0.0.1:7998
"""

import base64
import os
import sys
from typing import Annotated, Any

import torch
import uvicorn
from fastapi import Body, FastAPI
from sentence_transformers import SentenceTransformer

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
model = SentenceTransformer(sys.argv[1], device="cpu")
app = FastAPI()


@app.post("/embeddings")
def embeddings(input: Annotated[list[str], Body(embed=True)]) -> dict[str, Any]:
    vectors = model.encode(input, normalize_embeddings=True).astype("<f4")
    data = [{"index": i, "embedding": base64.b64encode(row.tobytes()).decode()} for i, row in enumerate(vectors)]
    return {"object": "list", "data": data}


uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
