// What a user of the official TypeScript SDK sees: bytes, names, pages, errors, expiry, workspaces. Run by `make test-sdk`.

import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { appendFileSync, createReadStream, mkdtempSync, rmSync, truncateSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";

import Anthropic, { toFile } from "@anthropic-ai/sdk";

const BETA = "files-api-2025-04-14";
const GA_KEYS = ["created_at", "downloadable", "expires_at", "filename", "id", "mime_type", "size_bytes", "type"];

async function ask(verb, options = {}) {
  const answer = await fetch(`${process.env.ROPEWALK_TEST_SEEDER}/${verb}`, { method: "POST", body: JSON.stringify(options) });
  assert.equal(answer.status, 200);
  return answer.json();
}

const server = (await ask("server")).url;

function connect(secret) {
  return new Anthropic({ baseURL: server, apiKey: secret, maxRetries: 0, logLevel: "off" });
}

async function fresh(options = {}) {
  const workspace = await ask("workspace", options);
  return { workspace, client: connect(workspace.secret) };
}

const text = (name = "a.txt", content = "abc") => toFile(Buffer.from(content), name, { type: "text/plain" });

async function bytes(client, id) {
  return Buffer.from(await (await client.files.download(id)).arrayBuffer());
}

async function ids(pages) {
  const found = [];
  for await (const file of pages) found.push(file.id);
  return found;
}

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    return error;
  }
  assert.fail("expected an error");
}

test("bytes come back", async () => {
  const { client } = await fresh();
  const data = randomBytes(300_001);
  const file = await client.files.upload({ file: await toFile(data, "a.bin", { type: "application/octet-stream" }) });
  assert.equal(file.type, "file");
  assert.equal(file.size_bytes, data.length);
  assert.match(file.id, /^file_/);
  assert.ok(data.equals(await bytes(client, file.id)));
});

test("a stream from a path keeps its name and type", async () => {
  const { client } = await fresh();
  const folder = mkdtempSync(join(tmpdir(), "sdk-"));
  try {
    const path = join(folder, "lease.pdf");
    const data = Buffer.concat([Buffer.from("%PDF-1.7\n"), randomBytes(8_000_000)]);
    writeFileSync(path, data);
    const file = await client.files.upload({ file: createReadStream(path) });
    assert.equal(file.filename, "lease.pdf");
    assert.equal(file.mime_type, "application/pdf");
    const sum = createHash("sha256");
    for await (const chunk of (await client.files.download(file.id)).body) sum.update(chunk);
    assert.equal(sum.digest("hex"), createHash("sha256").update(data).digest("hex"));
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("a name and a type that are given are kept", async () => {
  const { client } = await fresh();
  const file = await client.files.upload({ file: await text("Grüße 你好 'n.txt") });
  assert.equal(file.filename, "Grüße 你好 'n.txt");
  assert.equal(file.mime_type, "text/plain");
});

test("metadata is what the upload answered, with the documented keys and no others", async () => {
  const { client } = await fresh();
  const file = await client.files.upload({ file: await text() });
  const again = await client.files.retrieveMetadata(file.id);
  assert.deepEqual(Object.keys(again).sort(), GA_KEYS);
  assert.deepEqual(again, file);
});

test("a deleted file is gone", async () => {
  const { client } = await fresh();
  const file = await client.files.upload({ file: await text() });
  assert.deepEqual(await client.files.delete(file.id), { id: file.id, type: "file_deleted" });
  for (const call of [client.files.retrieveMetadata, client.files.download, client.files.delete]) {
    assert.ok((await failure(call.call(client.files, file.id))) instanceof Anthropic.NotFoundError);
  }
  assert.deepEqual(await ids(client.files.list()), []);
});

test("newest comes first", async () => {
  const { client } = await fresh();
  const made = [];
  for (let n = 0; n < 5; n++) made.unshift((await client.files.upload({ file: await text(`${n}.txt`) })).id);
  assert.deepEqual(await ids(client.files.list({ limit: 2 })), made);
});

test("2500 files are walked once each", async () => {
  const many = await ask("many", { count: 2500 });
  assert.equal(many.ids.length, 2500);
  assert.deepEqual(await ids(connect(many.secret).files.list({ limit: 1000 })), many.ids);
});

test("files are found by their ids", async () => {
  const { client } = await fresh();
  const one = await client.files.upload({ file: await text() });
  const page = await client.files.list({ ids: [one.id, "file_unknown"] });
  assert.deepEqual(page.data.map((file) => file.id), [one.id]);
  assert.equal(page.next_page, null);
  const refused = await failure(client.files.list({ ids: [one.id], limit: 5 }));
  assert.ok(refused instanceof Anthropic.BadRequestError);
});

test("the beta header brings the old list back", async () => {
  const { client } = await fresh();
  const made = (await client.files.upload({ file: await text() })).id;
  const raw = await client.get("/v1/files", { headers: { "anthropic-beta": BETA } });
  assert.deepEqual([raw.has_more, raw.first_id, raw.last_id], [false, made, made]);
  assert.ok(!("expires_at" in raw.data[0]));
});

test("an expiry is told, and outside an hour to ninety days refused", async () => {
  const { client } = await fresh();
  const file = await client.files.upload({ file: await text(), expires_in_seconds: 3600 });
  const seconds = (Date.parse(file.expires_at) - Date.parse(file.created_at)) / 1000;
  assert.ok(Math.abs(seconds - 3600) < 0.01);
  for (const wrong of [0, 3599, 7_776_001]) {
    const refused = await failure(client.files.upload({ file: await text(), expires_in_seconds: wrong }));
    assert.ok(refused instanceof Anthropic.BadRequestError);
  }
});

test("an expired file keeps its metadata alone", async () => {
  const { client } = await fresh();
  const file = await client.files.upload({ file: await text() });
  await ask("expire", { file_id: file.id });
  assert.equal((await client.files.retrieveMetadata(file.id)).id, file.id);
  assert.deepEqual(await ids(client.files.list()), [file.id]);
  assert.ok((await failure(client.files.download(file.id))) instanceof Anthropic.FileExpiredError);
});

test("a workspace may forbid downloads", async () => {
  const { client } = await fresh({ downloads: "nobody" });
  const file = await client.files.upload({ file: await text() });
  assert.equal(file.downloadable, false);
  assert.ok((await failure(client.files.download(file.id))) instanceof Anthropic.FileNotDownloadableError);
});

test("a full workspace says so", async () => {
  const { client } = await fresh({ limit_bytes: 1000 });
  await client.files.upload({ file: await text("a.txt", "a".repeat(900)) });
  const refused = await failure(client.files.upload({ file: await text("b.txt", "b".repeat(900)) }));
  assert.ok(refused instanceof Anthropic.StorageQuotaExceededError);
});

test("an unknown key is refused, and a key that may only read cannot write", async () => {
  const { client, workspace } = await fresh();
  const refused = await failure(connect("nobody's key").files.list());
  assert.ok(refused instanceof Anthropic.AuthenticationError);
  assert.match(refused.requestID, /^req_/);
  const reader = connect((await ask("key", { workspace_id: workspace.workspace_id, rights: ["read"] })).secret);
  assert.deepEqual(await ids(reader.files.list()), []);
  assert.ok((await failure(reader.files.upload({ file: await text() }))) instanceof Anthropic.PermissionDeniedError);
  assert.deepEqual(await ids(client.files.list()), []);
});

test("too many requests are told when to come back", async () => {
  const { client } = await fresh({ requests_per_minute: 3 });
  const asked = async () => {
    for (let n = 0; n < 8; n++) await client.files.list();
  };
  const refused = await failure(asked());
  assert.ok(refused instanceof Anthropic.RateLimitError);
  assert.ok(Number(refused.headers.get("retry-after")) > 0);
});

test("a name that the contract forbids is a bad request", async () => {
  const { client } = await fresh();
  for (const name of ["a<b.txt", "a|b.txt", "x".repeat(256)]) {
    assert.ok((await failure(client.files.upload({ file: await text(name) }))) instanceof Anthropic.BadRequestError);
  }
});

test("every answer has a request id and says whose it is", async () => {
  const { client, workspace } = await fresh();
  const { data, response, request_id } = await client.files.upload({ file: await text() }).withResponse();
  assert.match(request_id, /^req_/);
  assert.equal(data._request_id, request_id);
  assert.equal(response.headers.get("anthropic-workspace-id"), workspace.workspace_id);
  assert.equal(response.headers.get("anthropic-organization-id"), workspace.organization_id);
});

test("a foreign file answers like a missing one", async () => {
  const { client } = await fresh();
  const other = (await fresh()).client;
  const file = await client.files.upload({ file: await text() });
  const bodies = [];
  for (const id of [file.id, `file_${"0".repeat(file.id.length - 5)}`]) {
    const refused = await failure(other.files.retrieveMetadata(id));
    assert.ok(refused instanceof Anthropic.NotFoundError);
    bodies.push(JSON.stringify(refused.error).replaceAll(id, "ID").replaceAll(refused.requestID, "REQUEST"));
  }
  assert.equal(bodies[0], bodies[1]);
});

test("an upload that the SDK repeats is one file", async () => {
  const { client } = await fresh();
  const first = await client.files.upload({ file: await text() });
  const again = await client.files.upload({ file: await text() }, { headers: { "x-stainless-retry-count": "1" } });
  const meant = await client.files.upload({ file: await text() });
  assert.equal(again.id, first.id);
  assert.notEqual(meant.id, first.id);
});

test("models are those of the registry", async () => {
  const { client } = await fresh();
  await ask("model", { name: "ours-1" });
  assert.equal((await client.models.retrieve("ours-1")).id, "ours-1");
  assert.ok((await ids(client.models.list())).includes("ours-1"));
});

test("500 MB go up from a stream and come down whole", async () => {
  const { client } = await fresh();
  const folder = mkdtempSync(join(tmpdir(), "sdk-"));
  try {
    const path = join(folder, "huge.bin");
    const block = randomBytes(1_000_000);
    const sent = createHash("sha256");
    for (let n = 0; n < 500; n++) {
      block.writeUInt32BE(n);
      appendFileSync(path, block);
      sent.update(block);
    }
    const file = await client.files.upload({ file: createReadStream(path) });
    assert.equal(file.size_bytes, 500_000_000);
    const got = createHash("sha256");
    for await (const chunk of (await client.files.download(file.id)).body) got.update(chunk);
    assert.equal(got.digest("hex"), sent.digest("hex"));
    await client.files.delete(file.id);
  } finally {
    rmSync(folder, { recursive: true });
  }
});

test("a byte more than 500 MB is too large", async () => {
  const { client } = await fresh();
  const folder = mkdtempSync(join(tmpdir(), "sdk-"));
  try {
    const path = join(folder, "huge.bin");
    writeFileSync(path, "");
    truncateSync(path, 500_000_001);
    const refused = await failure(client.files.upload({ file: createReadStream(path) }));
    assert.ok(refused instanceof Anthropic.ContentTooLargeError, String(refused));
  } finally {
    rmSync(folder, { recursive: true });
  }
});
