// An application's tests with firebase-admin: `gocm sandbox exec -- node --test pushes.test.mjs`.
import assert from "node:assert/strict";
import test from "node:test";
import { initializeApp } from "firebase-admin/app";
import { getMessaging } from "firebase-admin/messaging";

initializeApp();
const messaging = getMessaging();
const sandbox = async path => (await fetch(`${process.env.GOCM_SANDBOX}/sandbox/${path}`)).json();
const to = token => ({token, notification: {title: "Hello"}, data: {order: "7"}});
const delivered = async () => (await sandbox("received")).delivered;

test("send", async () => {
  const message = {token: "js-one", notification: {title: "Hello"}, android: {priority: "high", collapseKey: "orders"}};
  assert.match(await messaging.send(message), /^projects\/sandbox-project\/messages\//);
  const {messages: [sent]} = await sandbox("messages?token=js-one&wait=5");
  assert.deepEqual(sent.message.message.notification, {title: "Hello"});
  assert.deepEqual(sent.message.message.android, {priority: "high", collapse_key: "orders"});
});

test("sendEach, by HTTP/2 and by HTTP/1.1", async () => {
  for (const way of ["h2", "h1"]) {
    if (way == "h1") messaging.enableLegacyHttpTransport();
    const answer = await messaging.sendEach(Array.from({length: 500}, (_, n) => to(`js-${way}-${n}`)));
    assert.equal(answer.successCount, 500);
    assert.equal(Object.keys(await delivered()).filter(each => each.startsWith(`js-${way}-`)).length, 500);
  }
});

test("multicast", async () => {
  const tokens = ["js-many-1", "gone-js-many", "js-many-2"];
  const answer = await messaging.sendEachForMulticast({tokens, data: {a: "b"}});
  assert.deepEqual(answer.responses.map(each => each.success), [true, false, true]);
});

test("dry run", async () => {
  await messaging.send(to("js-dry"), true);
  const {messages: [sent]} = await sandbox("messages?token=js-dry&wait=5");
  assert.equal(sent.message.validate_only, true);
  assert.equal((await delivered())["js-dry"], undefined);
});

test("topics", async () => {
  assert.equal((await messaging.subscribeToTopic(["js-member", "gone-js"], "js-news")).failureCount, 1);
  await messaging.send({topic: "js-news", data: {a: "b"}});
  await messaging.send({condition: "'js-news' in topics && !('other' in topics)", data: {a: "b"}});
  assert.equal((await delivered())["js-member"], 2);
  assert.equal((await messaging.unsubscribeFromTopic("js-member", "js-news")).successCount, 1);
  await messaging.send({topic: "js-news", data: {a: "b"}});
  assert.equal((await delivered())["js-member"], 2);
});

const errors = {
  "gone-js": "registration-token-not-registered",
  "mismatch-js": "mismatched-credential",
  "quota-js": "message-rate-exceeded",
  "error-third_party-js": "third-party-auth-error",
  "invalid-js": "invalid-argument",
  "error-unavailable-js": "server-unavailable",
  "error-internal-js": "internal-error",
};
for (const [token, code] of Object.entries(errors))
  test(token, () => assert.rejects(messaging.send(to(token)), {code: `messaging/${code}`}));
