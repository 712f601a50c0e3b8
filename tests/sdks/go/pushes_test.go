// An application's tests with firebase-admin: `gocm sandbox exec -- go test`.
package pushes

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	firebase "firebase.google.com/go/v4"
	"firebase.google.com/go/v4/messaging"
)

var ctx = context.Background()

func client(t *testing.T) *messaging.Client {
	app, err := firebase.NewApp(ctx, nil)
	must(t, err)
	made, err := app.Messaging(ctx)
	must(t, err)
	return made
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func sandbox(t *testing.T, path string, into any) {
	answer, err := http.Get(os.Getenv("GOCM_SANDBOX") + "/sandbox/" + path)
	must(t, err)
	defer answer.Body.Close()
	must(t, json.NewDecoder(answer.Body).Decode(into))
}

type sent struct {
	Messages []struct {
		Message struct {
			ValidateOnly bool `json:"validate_only"`
			Message      messaging.Message
		}
	}
}

func delivered(t *testing.T) map[string]int {
	var received struct{ Delivered map[string]int }
	sandbox(t, "received", &received)
	return received.Delivered
}

func to(token string) *messaging.Message {
	note := &messaging.Notification{Title: "Hello"}
	return &messaging.Message{Token: token, Notification: note, Data: map[string]string{"order": "7"}}
}

func TestSend(t *testing.T) {
	message := to("go-one")
	message.Android = &messaging.AndroidConfig{Priority: "high", CollapseKey: "orders"}
	name, err := client(t).Send(ctx, message)
	must(t, err)
	var found sent
	sandbox(t, "messages?token=go-one&wait=5", &found)
	got := found.Messages[0].Message.Message
	if !strings.HasPrefix(name, "projects/sandbox-project/messages/") || got.Notification.Title != "Hello" ||
		got.Android.CollapseKey != "orders" {
		t.Fatal(name, got)
	}
}

func TestSendEach(t *testing.T) {
	var messages []*messaging.Message
	for n := range 500 {
		messages = append(messages, to(fmt.Sprintf("go-each-%d", n)))
	}
	answer, err := client(t).SendEach(ctx, messages)
	must(t, err)
	count := 0
	for token := range delivered(t) {
		if strings.HasPrefix(token, "go-each-") {
			count++
		}
	}
	if answer.SuccessCount != 500 || count != 500 {
		t.Fatal(answer.SuccessCount, count)
	}
}

func TestMulticast(t *testing.T) {
	many := &messaging.MulticastMessage{Tokens: []string{"go-many-1", "gone-go-many", "go-many-2"}}
	answer, err := client(t).SendEachForMulticast(ctx, many)
	must(t, err)
	if answer.SuccessCount != 2 || answer.Responses[1].Success {
		t.Fatal(answer)
	}
}

func TestDryRun(t *testing.T) {
	_, err := client(t).SendDryRun(ctx, to("go-dry"))
	must(t, err)
	var found sent
	sandbox(t, "messages?token=go-dry&wait=5", &found)
	if !found.Messages[0].Message.ValidateOnly || delivered(t)["go-dry"] != 0 {
		t.Fatal(found)
	}
}

func TestTopics(t *testing.T) {
	pushes := client(t)
	answer, err := pushes.SubscribeToTopic(ctx, []string{"go-member", "gone-go"}, "go-news")
	must(t, err)
	_, err = pushes.Send(ctx, &messaging.Message{Topic: "go-news"})
	must(t, err)
	_, err = pushes.Send(ctx, &messaging.Message{Condition: "'go-news' in topics && !('other' in topics)"})
	must(t, err)
	if answer.FailureCount != 1 || delivered(t)["go-member"] != 2 {
		t.Fatal(answer, delivered(t))
	}
	answer, err = pushes.UnsubscribeFromTopic(ctx, []string{"go-member"}, "go-news")
	must(t, err)
	_, err = pushes.Send(ctx, &messaging.Message{Topic: "go-news"})
	must(t, err)
	if answer.SuccessCount != 1 || delivered(t)["go-member"] != 2 {
		t.Fatal(answer, delivered(t))
	}
}

func TestErrors(t *testing.T) {
	for token, is := range map[string]func(error) bool{
		"gone-go":              messaging.IsUnregistered,
		"mismatch-go":          messaging.IsSenderIDMismatch,
		"quota-go":             messaging.IsQuotaExceeded,
		"error-third_party-go": messaging.IsThirdPartyAuthError,
		"invalid-go":           messaging.IsInvalidArgument,
		"error-unavailable-go": messaging.IsUnavailable,
		"error-internal-go":    messaging.IsInternal,
	} {
		t.Run(token, func(t *testing.T) {
			t.Parallel()
			if _, err := client(t).Send(ctx, to(token)); !is(err) {
				t.Fatal(err)
			}
		})
	}
}
