import static org.junit.jupiter.api.Assertions.*;

import com.google.firebase.FirebaseApp;
import com.google.firebase.messaging.*;
import java.net.URI;
import java.net.http.*;
import java.util.*;
import java.util.stream.*;
import com.google.gson.*;
import org.junit.jupiter.api.*;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

/** An application's tests with firebase-admin: `gocm sandbox exec -- mvn test`. */
class PushesTest {
  static FirebaseMessaging messaging;

  @BeforeAll
  static void start() {
    FirebaseApp.initializeApp();
    messaging = FirebaseMessaging.getInstance();
  }

  static JsonObject sandbox(String path) throws Exception {
    var asked = HttpRequest.newBuilder(URI.create(System.getenv("GOCM_SANDBOX") + "/sandbox/" + path)).build();
    var answer = HttpClient.newHttpClient().send(asked, HttpResponse.BodyHandlers.ofString());
    return JsonParser.parseString(answer.body()).getAsJsonObject();
  }

  static JsonObject delivered() throws Exception {
    return sandbox("received").getAsJsonObject("delivered");
  }

  static JsonObject sent(String token) throws Exception {
    var found = sandbox("messages?wait=5&token=" + token).getAsJsonArray("messages");
    assertEquals(1, found.size());
    return found.get(0).getAsJsonObject().getAsJsonObject("message");
  }

  static Message.Builder to(String token) {
    return Message.builder().setToken(token).setNotification(Notification.builder().setTitle("Hello").build());
  }

  @Test
  void send() throws Exception {
    var android = AndroidConfig.builder().setPriority(AndroidConfig.Priority.HIGH).setCollapseKey("orders").build();
    String name = messaging.send(to("java-one").setAndroidConfig(android).build());
    assertTrue(name.startsWith("projects/sandbox-project/messages/"), name);
    var message = sent("java-one").getAsJsonObject("message");
    assertEquals("{\"title\":\"Hello\"}", message.get("notification").toString());
    assertEquals("orders", message.getAsJsonObject("android").get("collapse_key").getAsString());
  }

  @Test
  void sendEach() throws Exception {
    var messages = IntStream.range(0, 500).mapToObj(n -> to("java-each-" + n).build()).collect(Collectors.toList());
    assertEquals(500, messaging.sendEach(messages).getSuccessCount());
    assertEquals(500, delivered().keySet().stream().filter(each -> each.startsWith("java-each-")).count());
  }

  @Test
  void multicast() throws Exception {
    var tokens = List.of("java-many-1", "gone-java-many", "java-many-2");
    var answer = messaging.sendEachForMulticast(MulticastMessage.builder().addAllTokens(tokens).build());
    assertEquals(List.of(true, false, true),
        answer.getResponses().stream().map(SendResponse::isSuccessful).collect(Collectors.toList()));
  }

  @Test
  void dryRun() throws Exception {
    messaging.send(to("java-dry").build(), true);
    assertTrue(sent("java-dry").get("validate_only").getAsBoolean());
    assertFalse(delivered().has("java-dry"));
  }

  @Test
  void topics() throws Exception {
    assertEquals(1, messaging.subscribeToTopic(List.of("java-member", "gone-java"), "java-news").getFailureCount());
    messaging.send(Message.builder().setTopic("java-news").build());
    messaging.send(Message.builder().setCondition("'java-news' in topics && !('other' in topics)").build());
    assertEquals(2, delivered().get("java-member").getAsInt());
    assertEquals(1, messaging.unsubscribeFromTopic(List.of("java-member"), "java-news").getSuccessCount());
    messaging.send(Message.builder().setTopic("java-news").build());
    assertEquals(2, delivered().get("java-member").getAsInt());
  }

  @ParameterizedTest
  @CsvSource({
    "gone-java, UNREGISTERED", "mismatch-java, SENDER_ID_MISMATCH", "quota-java, QUOTA_EXCEEDED",
    "error-third_party-java, THIRD_PARTY_AUTH_ERROR", "invalid-java, INVALID_ARGUMENT",
    "error-unavailable-java, UNAVAILABLE", "error-internal-java, INTERNAL"
  })
  void errors(String token, MessagingErrorCode code) {
    var error = assertThrows(FirebaseMessagingException.class, () -> messaging.send(to(token).build()));
    assertEquals(code, error.getMessagingErrorCode());
  }
}
